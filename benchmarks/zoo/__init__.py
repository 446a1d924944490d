"""Every architecture of transformers, tiny: whatever is fused, nothing may change."""
