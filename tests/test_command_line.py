"""`python -m module_fusion plan|verify|bench`: the same reports, JSON, exit codes."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from kernels import use_kernel_mapping
from support import InMemoryRepository
from torch import Tensor, nn

from module_fusion.__main__ import main

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A Llama's config without weights."""
    hf.LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).save_pretrained(folder)
    return str(folder)


def test_plan_says_what_would_be_fused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "would fuse x2" in said
    assert "LlamaRMSNorm -> LlamaMLP" in said


def test_plan_prints_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--json", "--device", "cpu"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["family"] for group in groups] == ["rms_norm_mlp"] * 2


def test_families_are_chosen_by_name(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", config, "--json", "--device", "cpu", "--families", "patch_embeddings"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == []


@pytest.mark.parametrize("more", [[], ["--generate", "3"], ["--gradients"]])
def test_a_checkpoint_is_verified(
    checkpoint: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", checkpoint, "--json", "--device", "cpu", *more]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is True
    assert [group["kernel_calls"] > 0 for group in said["groups"]] == [True, True]


def test_a_vision_config_gets_random_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf.ViTConfig(**VISION, architectures=["ViTModel"]).save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--json", "--device", "cpu"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [(group["kernel"], group["kernel_calls"]) for group in groups] == [("PatchEmbed", 1)]


class WrongRMSNormMLP(nn.Module):
    """Adds a thousandth: never certified by `fuse`, so it is put in by a mapping and a family."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3


def test_verify_exits_with_1_where_a_kernel_is_wrong(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The certificate refuses such a kernel; without it, verify has to find out by itself.
    from module_fusion.families import certificate

    monkeypatch.setattr(certificate.Certificates, "of", lambda *_: None)
    with use_kernel_mapping({"RMSNormMLP": {"cpu": InMemoryRepository(WrongRMSNormMLP)}}):
        assert main(["verify", checkpoint, "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


class OfNoGradient(WrongRMSNormMLP):
    has_backward = False


@pytest.mark.parametrize(("more", "code"), [([], 1), (["--gradients"], 0)])
def test_verify_records_gradients_only_where_they_are_compared(
    checkpoint: str,
    more: list[str],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from module_fusion.families import certificate

    monkeypatch.setattr(certificate.Certificates, "of", lambda *_: None)
    with use_kernel_mapping({"RMSNormMLP": {"cpu": InMemoryRepository(OfNoGradient)}}):
        assert main(["verify", checkpoint, "--device", "cpu", *more]) == code
    assert ("NOT CHECKED" in capsys.readouterr().out) == bool(more)


def test_bench_measures_fused_and_unfused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", config, "--json", "--device", "cpu", "--seconds", "0.1"]
    assert main([*arguments, "--tokens", "8", "--batch", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["unfused", "fused"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[1]["kernel_calls"] > 0


def test_inputs_come_from_a_file(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"input_ids": torch.arange(6).view(2, 3)}, tmp_path / "inputs.pt")
    arguments = ["verify", config, "--device", "cpu", "--inputs", str(tmp_path / "inputs.pt")]
    assert main(arguments) == 0
    torch.save([1], tmp_path / "inputs.pt")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "save a dict of the model's keyword arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({1: torch.ones(1, 3, dtype=torch.long)}, "has the key 1 of class int; keys are the names"),
        ({"gradients": True}, "has 'gradients', which is an option of verify and not an input"),
        ({"method": "generate"}, "has 'method', which is an option of verify and not an input"),
        ({"do_sample": True}, "has 'do_sample', which --generate sets"),
    ],
)
def test_keys_of_a_file_of_inputs_that_are_none_of_the_models_are_refused(
    config: str, tmp_path: Path, inputs: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = ["verify", config, "--device", "cpu", "--inputs", str(tmp_path / "inputs.pt")]
    assert main([*arguments, "--generate", "2"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_where_nothing_is_fused_the_reasons_are_those_of_plan(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {**TEXT, "hidden_act": "relu6"}
    hf.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--device", "cpu"]) == 0
    planned = capsys.readouterr().out.strip()
    assert "skipped" in planned
    assert main([command, str(tmp_path), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert planned in said
    assert "Fuse it first" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "nowhere"], "There is no file or folder 'nowhere'"),
        (["plan", "CONFIG", "--families", "rms_norm"], "There is no family 'rms_norm'. Did you"),
        (["verify", "CONFIG", "--generate", "0"], "--generate is at least 1, not 0"),
        (["plan", "LIST"], "has no config: a config is a JSON object"),
        (["verify", "CONFIG", "--families", "patch_embeddings"], "Nothing is fused in this model"),
    ],
)
def test_what_cannot_be_done_exits_with_2_and_says_why(
    config: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (listed := Path(config).with_name("list.json")).write_text("[1]")
    places = {"CONFIG": config, "LIST": str(listed)}
    filled = [places.get(argument, argument) for argument in arguments]
    assert main([*filled, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


CLIP = {"text_config": TEXT, "vision_config": VISION}


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_model_that_needs_more_than_one_input_says_how_to_give_them(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hf.CLIPConfig(**CLIP, architectures=["CLIPModel"])
    config.save_pretrained(tmp_path)
    arguments = [command, str(tmp_path / "config.json"), "--device", "cpu"]
    if command == "bench":
        arguments += ["--seconds", "0.1"]
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("module_fusion: CLIPModel does not run on a random 'input_ids' alone:")
    assert "give the file: --inputs inputs.pt" in said
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    torch.save({**inputs, "pixel_values": torch.randn(1, 3, 32, 32)}, tmp_path / "inputs.pt")
    assert main([*arguments, "--inputs", str(tmp_path / "inputs.pt")]) == 0
    # What a file has is not random, and is not said to be.
    torch.save(inputs, tmp_path / "inputs.pt")
    capsys.readouterr()
    assert main([*arguments, "--inputs", str(tmp_path / "inputs.pt")]) == 2
    assert "random 'input_ids'" not in capsys.readouterr().err


class _Network(AssertionError):
    pass


@pytest.mark.parametrize("command", ["plan", "verify", "bench"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoModel": "own.M"}}, "names code of its own in 'auto_map', {'AutoModel'"),
        (
            {"auto_map": {"AutoConfig": "own--x.C"}, "model_type": "none_of_ours"},
            "runs none that comes with a checkpoint",
        ),
        ({"architectures": "LlamaForCausalLM"}, "is a list of names of classes, such as"),
        ({"architectures": [1]}, "is a list of names of classes, such as"),
        ({"architectures": ["Trainer"]}, "'Trainer', which is no model of transformers"),
        ({"architectures": ["AutoTokenizer"]}, "'AutoTokenizer', which is no model of"),
        ({"architectures": ["BertModel"]}, "'BertModel', whose config is a BertConfig;"),
        ({"model_type": "none_of_ours"}, "model type `none_of_ours`"),
    ],
)
def test_configs_that_are_not_usable_are_refused_in_one_line_without_the_network(
    config: str,
    command: str,
    change: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(*_: object) -> None:
        raise _Network

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("builtins.input", connect)
    Path(config).write_text(json.dumps({**json.loads(Path(config).read_text()), **change}))
    assert main([command, config, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert said in line


def test_the_commands_of_the_guide_run_as_they_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with the two things they name: a config, and a checkpoint."""
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    start = "    python -m module_fusion "
    commands = [line[len(start) :] for line in guide.splitlines() if line.startswith(start)]
    assert {command.split()[0] for command in commands} == {"plan", "verify", "bench"}
    torch.manual_seed(0)
    config = hf.LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = shlex.split(command)
        if arguments[0] == "bench":  # As written it takes up to five seconds.
            arguments += ["--seconds", "0.1"]
        capsys.readouterr()
        assert main(arguments) == 0, command
        said = capsys.readouterr().out
        if "--json" in arguments:
            assert json.loads(said)
        else:
            assert "layers.[0-1]: post_attention_layernorm -> mlp" in said


def test_without_transformers_it_says_what_to_install(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", config, "--device", "cpu"]) == 2
    assert "pip install 'module-fusion[transformers]'" in capsys.readouterr().err


def test_it_is_a_command(config: str) -> None:
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "module_fusion", "plan", config, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert run.returncode == 0, run.stderr
    assert "would fuse x2" in run.stdout
