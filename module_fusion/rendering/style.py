"""The style of reports in notebooks: one palette with a light and a dark side.

Colours follow the theme where the notebook tells it, else the system's.
"""

STYLE = """
.mf-report { color-scheme: light dark;
  --mf-text: light-dark(#1f2328, #e6e9ee); --mf-muted: light-dark(#59636e, #9aa4b0);
  --mf-page: light-dark(#ffffff, #16191e); --mf-line: light-dark(#d5dae0, #3a414b);
  --mf-kernel: light-dark(#116329, #56d364); --mf-kernel-tint: light-dark(#eff8f0, #15241a);
  --mf-members: light-dark(#7d4e00, #e3b341); --mf-members-tint: light-dark(#fff8e5, #292313);
  font: 13px/1.5 system-ui, sans-serif; color: var(--mf-text); background: var(--mf-page);
  border: 1px solid var(--mf-line); border-radius: 8px; padding: 10px 14px; margin: 2px 0;
  box-sizing: border-box; width: fit-content; max-width: 100%; overflow-x: auto; }
body[data-jp-theme-light="true"] .mf-report, .vscode-light .mf-report, [theme="light"] .mf-report,
[data-theme="light"] .mf-report, [data-md-color-scheme="default"] .mf-report
  { color-scheme: light; }
body[data-jp-theme-light="false"] .mf-report, .vscode-dark .mf-report,
.vscode-high-contrast .mf-report, [theme="dark"] .mf-report, [data-theme="dark"] .mf-report,
[data-md-color-scheme="slate"] .mf-report
  { color-scheme: dark; }
.vscode-high-contrast-light .mf-report { color-scheme: light; }
.mf-report .mf-title { margin: 0 0 6px; font-weight: 600; color: inherit; }
.mf-report .mf-note { margin: 4px 0; color: inherit; max-width: 760px; }
.mf-report .mf-muted { color: var(--mf-muted); }
.mf-report code { font: 12px/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: inherit; background: none; border: 0; padding: 0; }
.mf-report table.mf-table { display: table; width: auto; margin: 0; border: 0; font: inherit;
  border-collapse: collapse; color: inherit; background: none; }
.mf-report table.mf-table caption { text-align: left; padding: 4px 0; color: var(--mf-muted); }
.mf-report table.mf-table tr { background: none; border: 0; }
.mf-report table.mf-table :is(td, th) { max-width: 440px; padding: 6px 16px 6px 0; border: 0;
  text-align: left; vertical-align: top; font-size: inherit; color: inherit; background: none;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; white-space: normal; }
.mf-report table.mf-table tr.mf-row > td:last-child { min-width: 150px; }
.mf-report table.mf-table th { font-weight: 500; color: var(--mf-muted); padding-top: 0;
  overflow-wrap: normal; }
.mf-report table.mf-table tr.mf-row > td { border-top: 1px solid var(--mf-line); }
.mf-report table.mf-table tr > td.mf-wide { max-width: none; padding: 2px 0 14px; }
.mf-report :is(.mf-badge, .mf-unbroken) { white-space: nowrap; }
.mf-report .mf-badge { font-weight: 600; }
.mf-report :is(.mf-badge-skipped, .mf-badge-unfused) { color: var(--mf-muted); }
.mf-report .mf-scroll { contain: inline-size; overflow-x: auto; }
.mf-report svg.mf-chain { display: block; max-width: none; }
.mf-report .mf-chain text { fill: var(--mf-muted);
  font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.mf-report .mf-chain :is(.mf-role, .mf-kernel-name) { font-size: 13px; font-weight: 600;
  fill: var(--mf-text); }
.mf-report .mf-chain .mf-wire { fill: none; stroke: var(--mf-muted); }
.mf-report .mf-chain .mf-optional { stroke-dasharray: 3 3; }
.mf-report .mf-chain .mf-head { fill: var(--mf-muted); }
.mf-report .mf-chain .mf-box { fill: var(--mf-page); stroke: var(--mf-muted); }
.mf-report .mf-chain .mf-frame { fill: none; stroke: var(--mf-line); }
.mf-report .mf-kernel .mf-frame { fill: var(--mf-kernel-tint); stroke: var(--mf-kernel); }
.mf-report :is(.mf-members, .mf-mixed) .mf-frame { fill: var(--mf-members-tint);
  stroke: var(--mf-members); }
.mf-report .mf-members .mf-frame { stroke-dasharray: 5 4; }
.mf-report .mf-kernel .mf-state { fill: var(--mf-kernel); }
.mf-report :is(.mf-members, .mf-mixed) .mf-state { fill: var(--mf-members); }
"""
