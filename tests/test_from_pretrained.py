"""`from_pretrained` and `save_pretrained`: fused models and plain transformers, both ways."""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import Mode
from packed import PackedNormMLP, PackedNormMLPFamily
from safetensors.torch import load_file, save_file
from support import mapped
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from module_fusion import (
    FusionError,
    NotFusableError,
    PathNotFoundError,
    from_pretrained,
    fuse,
    register_family,
    report,
    unfuse_modules,
)
from module_fusion.families import (
    WeightLayout,
    family,
    pack_state_dict,
    packed_layouts,
    unpack_state_dict,
)
from module_fusion.integrations.transformers import save_pretrained

PACKED = {"packed_norm_mlp": True}


@pytest.fixture(autouse=True)
def _family() -> Iterator[None]:
    register_family(PackedNormMLPFamily)
    with mapped(PackedNormMLP=PackedNormMLP):
        yield


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint written by plain transformers."""
    llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def tokens() -> Tensor:
    return torch.arange(12).reshape(2, 6)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        value: Tensor = model(tokens).logits
    return value


def file_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def stored(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("module_fusion")


def kernels_of(model: nn.Module) -> set[str | None]:
    return {group.kernel for group in report(model).fused}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    as_bytes = [
        {k: (v.dtype, v.shape, v.contiguous().view(torch.uint8).tolist()) for k, v in d.items()}
        for d in (a, b)
    ]
    return as_bytes[0] == as_bytes[1]


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_it_loads_and_fuses_and_the_report_shows_it(folder: Path, tokens: Tensor, cls: Any) -> None:
    model = from_pretrained(cls, folder, fusion_config={"rms_norm_mlp": True})
    assert type(model) is LlamaForCausalLM
    assert [group.family for group in report(model).fused] == ["rms_norm_mlp"] * 3
    torch.testing.assert_close(
        logits(model, tokens), logits(LlamaForCausalLM.from_pretrained(folder), tokens)
    )
    assert [group.kernel_calls for group in report(model).groups] == [1] * 3
    assert model.config.module_fusion == {"families": [["rms_norm_mlp", True]]}
    assert not hasattr(model.config, "fusion_config")


def test_without_a_config_it_is_what_transformers_loads(folder: Path) -> None:
    for config in (None, False):
        model = from_pretrained(LlamaForCausalLM, folder, fusion_config=config)
        assert not report(model).groups
        assert not hasattr(model.config, "module_fusion")


def test_a_plain_save_keeps_the_config_and_the_bytes_both_ways(
    folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    assert kernels_of(model) == {"PackedNormMLP"}
    model.save_pretrained(tmp_path / "fused")
    assert file_of(tmp_path / "fused") == file_of(folder)
    assert stored(tmp_path / "fused") == {"families": [["packed_norm_mlp", True]]}
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(info.values())
    assert not report(plain).groups
    plain.save_pretrained(tmp_path / "plain again")
    assert file_of(tmp_path / "plain again") == file_of(folder)
    again = from_pretrained(LlamaForCausalLM, tmp_path / "plain again")
    assert kernels_of(again) == {"PackedNormMLP"}
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    unfuse_modules(again)
    assert torch.equal(logits(again, tokens), logits(plain, tokens))


def test_training_is_in_the_checkpoint(folder: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    save_pretrained(model, tmp_path / "trained")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "trained")
    assert same_bits(plain.state_dict(), model.state_dict())
    assert file_of(tmp_path / "trained") != file_of(folder)
    unfuse_modules(model)
    assert torch.equal(logits(model, tokens), logits(plain, tokens))


def test_the_order_of_families_and_their_options_survive(folder: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "rms_norm_mlp": {
            "include": ("model.layers.[0:2].mlp",),
            "mode": Mode.INFERENCE | Mode.TORCH_COMPILE,
        },
        "packed_norm_mlp": {"include": "model.layers.2.mlp", "mode": "INFERENCE"},
        "patch_embeddings": False,
    }
    before = copy.copy(config)
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=config)
    assert config == before
    families = ["rms_norm_mlp", "rms_norm_mlp", "packed_norm_mlp"]
    assert [group.family for group in report(model).fused] == families
    model.save_pretrained(tmp_path / "fused")
    assert stored(tmp_path / "fused") == {
        "families": [
            [
                "rms_norm_mlp",
                {"include": ["model.layers.[0:2].mlp"], "mode": "INFERENCE|TORCH_COMPILE"},
            ],
            ["packed_norm_mlp", {"include": "model.layers.2.mlp", "mode": "INFERENCE"}],
            ["patch_embeddings", False],
        ]
    }
    again = from_pretrained(LlamaForCausalLM, tmp_path / "fused")
    assert [group.family for group in report(again).fused] == families
    assert again.config.module_fusion == model.config.module_fusion


def test_true_is_stored_as_true(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=True)
    assert len(report(model).fused) == 3
    model.save_pretrained(tmp_path / "fused")
    assert stored(tmp_path / "fused") == {"families": True}
    assert len(report(from_pretrained(LlamaForCausalLM, tmp_path / "fused")).fused) == 3


def test_false_ignores_the_stored_config_and_another_one_replaces_it(
    folder: Path, tmp_path: Path
) -> None:
    from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED).save_pretrained(tmp_path / "a")
    ignored = from_pretrained(LlamaForCausalLM, tmp_path / "a", fusion_config=False)
    assert not report(ignored).groups
    assert ignored.config.module_fusion == {"families": [["packed_norm_mlp", True]]}
    other = from_pretrained(LlamaForCausalLM, tmp_path / "a", fusion_config={"rms_norm_mlp": True})
    assert kernels_of(other) == {"RMSNormMLP"}
    assert other.config.module_fusion == {"families": [["rms_norm_mlp", True]]}


def rewrite(folder: Path, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "module_fusion": value}))


UNFIT: dict[str, tuple[Any, str]] = {
    "not registered": (
        {"families": [["gone", True], ["packed_norm_mlp", True]]},
        "'gone' (There is no family 'gone'. Did you mean ",
    ),
    "no group": (
        {"families": [["patch_embeddings", True], ["packed_norm_mlp", True]]},
        "'patch_embeddings' (no group fits).",
    ),
    "a path": (
        {"families": [["rms_norm_mlp", {"include": "nowhere"}], ["packed_norm_mlp", True]]},
        "'rms_norm_mlp' (",
    ),
    "an option": (
        {"families": [["rms_norm_mlp", {"speed": 3}], ["packed_norm_mlp", True]]},
        "'rms_norm_mlp' ('rms_norm_mlp' has no option 'speed'",
    ),
    "a mode": (
        {"families": [["rms_norm_mlp", {"mode": "FAST"}], ["packed_norm_mlp", True]]},
        "'rms_norm_mlp' (mode is a kernels.Mode, such as Mode.INFERENCE, not 'FAST')",
    ),
    "a mapping by hand": ({"families": {"gone": True, "packed_norm_mlp": True}}, "'gone' (There"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_stored_family_that_no_longer_fits_is_a_warning_and_the_others_are_fused(
    folder: Path, kind: str
) -> None:
    value, message = UNFIT[kind]
    rewrite(folder, value)
    with pytest.warns(UserWarning, match="^Not fused") as caught:
        model = from_pretrained(LlamaForCausalLM, folder)
    [warning] = [w for w in caught if str(w.message).startswith("Not fused")]
    assert str(warning.message).startswith(f"Not fused in {folder}: {message}")
    assert warning.filename == __file__
    assert kernels_of(model) == {"PackedNormMLP"}
    assert model.config.module_fusion == value


@pytest.mark.parametrize(
    "value",
    [
        3,
        [1],
        {"families": "all"},
        {"families": [["a"]]},
        {"families": [[["a"], True]]},
        {"packed": True},
        {"packed": {"a": 1}},
        {"packed": {"model.layers.0.mlp.fused_kernel.x": {}}},
    ],
)
def test_a_stored_config_that_cannot_be_read_is_a_warning(folder: Path, value: Any) -> None:
    rewrite(folder, value)
    with pytest.warns(UserWarning, match="the stored config cannot be read"):
        model = from_pretrained(LlamaForCausalLM, folder)
    assert not report(model).groups


def test_what_was_asked_for_and_does_not_fit_is_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"'patch_embeddings' \(no group fits\)\.$"):
        from_pretrained(LlamaForCausalLM, folder, fusion_config={"patch_embeddings": True})


def test_the_whole_report_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "module_fusion"):
        from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    assert "3 fused:" in caplog.text


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"nothing": True}, NotFusableError, "There is no family 'nothing'"),
        ({"rms_norm_mlp": {"speed": 3}}, FusionError, "has no option 'speed'"),
        ({"rms_norm_mlp": 3}, FusionError, "The options of 'rms_norm_mlp' are"),
        ({"rms_norm_mlp": {"mode": "FAST"}}, NotFusableError, "or its name, not 'FAST'"),
        (3, FusionError, "families is True or a mapping"),
        ([[["a"], True]], FusionError, r"no list of names with options: \[\[\['a'\], True\]\]"),
        ([[{"a": 1}, True]], FusionError, "no list of names with options"),
    ],
)
def test_a_bad_config_is_an_error_before_anything_is_loaded(
    config: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_pretrained(None, "nowhere", fusion_config=config)


def test_a_path_that_matches_nothing_is_an_error(folder: Path) -> None:
    config = {"rms_norm_mlp": {"include": "nowhere"}}
    with pytest.raises(PathNotFoundError):
        from_pretrained(LlamaForCausalLM, folder, fusion_config=config)


def test_a_missing_checkpoint_is_transformers_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no file named"):
        from_pretrained(LlamaForCausalLM, tmp_path, config=llama().config)


def test_a_state_dict_without_a_checkpoint_is_loaded_and_fused(tokens: Tensor) -> None:
    given = llama()
    options: dict[str, Any] = {"config": given.config, "state_dict": given.state_dict()}
    model = from_pretrained(LlamaForCausalLM, None, fusion_config=PACKED, **options)
    assert same_bits(model.state_dict(), given.state_dict())
    assert kernels_of(model) == {"PackedNormMLP"}
    assert not report(from_pretrained(LlamaForCausalLM, None, **options)).groups
    given.config.module_fusion = {"families": [["packed_norm_mlp", True]]}
    again = from_pretrained(LlamaForCausalLM, None, **options)
    assert kernels_of(again) == {"PackedNormMLP"}
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.warns(UserWarning, match=r"^Not fused in LlamaForCausalLM: 'patch_embeddings' \("):
        from_pretrained(LlamaForCausalLM, None, fusion_config={"patch_embeddings": True}, **options)


def test_without_transformers_it_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'module-fusion\[transformers\]'"):
        from_pretrained(LlamaForCausalLM, folder)


def test_the_options_of_transformers_are_passed_on(folder: Path) -> None:
    given = LlamaConfig.from_pretrained(folder)
    model, info = from_pretrained(
        LlamaForCausalLM,
        folder,
        fusion_config=PACKED,
        config=given,
        dtype=torch.float64,
        output_loading_info=True,
    )
    assert not any(info.values())
    assert model.dtype is torch.float64
    assert kernels_of(model) == {"PackedNormMLP"}
    assert not hasattr(given, "module_fusion")


def unpacked_weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_the_packed_format_loads_back_with_the_same_bits(
    folder: Path, tmp_path: Path, tokens: Tensor, shards: int, cls: Any
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    model.generation_config.max_new_tokens = 7
    expected = logits(model, tokens)
    options: dict[str, Any] = {} if shards == 1 else {"max_shard_size": "40KB"}
    save_pretrained(model, tmp_path / "packed", save_original_format=False, **options)
    (tmp_path / "packed" / "modeling_of_mine.py").write_text("# code on the Hub")
    assert model.config.module_fusion == {"families": [["packed_norm_mlp", True]]}
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) is (shards > 1)
    names = unpacked_weights(tmp_path / "packed")
    assert names["model.layers.0.mlp.fused_kernel.gate_up"].shape == (128, 32)
    assert not any("gate_proj" in name or "up_proj" in name for name in names)
    layouts = names.pop("module_fusion.layouts")
    assert json.loads(bytes(layouts.tolist())) == packed_layouts(model)
    assert sum(v.nbytes for v in names.values()) == sum(p.nbytes for p in model.parameters())

    again, info = from_pretrained(cls, tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert same_bits(again.state_dict(), model.state_dict())
    assert kernels_of(again) == {"PackedNormMLP"}
    assert torch.equal(logits(again, tokens), expected)
    assert again.config.module_fusion == model.config.module_fusion
    assert again.name_or_path == str(tmp_path / "packed")
    assert again.generation_config.max_new_tokens == 7
    again.generation_config = LlamaForCausalLM.from_pretrained(folder).generation_config
    again.save_pretrained(tmp_path / "original")
    assert file_of(tmp_path / "original") == file_of(folder)
    unfused = from_pretrained(cls, tmp_path / "packed", fusion_config=False)
    assert not report(unfused).groups
    assert same_bits(unfused.state_dict(), model.state_dict())


def test_plain_transformers_does_not_take_packed_weights_for_its_own(
    folder: Path, tmp_path: Path
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(FusionError, match=r"has weights in the original format, model\.safe"):
        save_pretrained(model, folder, save_original_format=False)
    assert file_of(folder)
    with pytest.raises(FusionError, match="variant='fp16' cannot be another one"):
        save_pretrained(model, tmp_path / "x", save_original_format=False, variant="fp16")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_with_the_weights_in_both_formats_is_refused_with_the_way_out(
    folder: Path, tmp_path: Path, shards: int
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    options: dict[str, Any] = {} if shards == 1 else {"max_shard_size": "40KB"}
    both = tmp_path / "both"
    save_pretrained(model, both, save_original_format=False, **options)
    trained = LlamaForCausalLM(LlamaConfig.from_pretrained(both))
    trained.save_pretrained(both)
    with pytest.raises(FusionError) as error:
        from_pretrained(LlamaForCausalLM, both)
    name = "model.packed.safetensors" if shards == 1 else "model.safetensors.index.packed.json"
    assert str(error.value) == (
        f"{both} has the weights twice, in the packed format, {name}, and in the original one, "
        f"model.safetensors, and nothing says which are newer. To keep the original ones, remove "
        f"model.packed*.safetensors and model.safetensors.index.packed.json; to keep the packed "
        f"ones, remove the other files of weights, such as model.safetensors."
    )
    for pattern in ("model.packed*.safetensors", "model.safetensors.index.packed.json"):
        for file in both.glob(pattern):
            file.unlink()
    assert same_bits(from_pretrained(LlamaForCausalLM, both).state_dict(), trained.state_dict())


def sizes_in(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("before", [{}, {"max_shard_size": "40KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("both", [False, True])
def test_a_save_in_the_original_format_takes_the_place_of_a_packed_one(
    folder: Path, tmp_path: Path, before: dict[str, Any], options: dict[str, Any], both: bool
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    place = tmp_path / "packed"
    save_pretrained(model, place, save_original_format=False, **before)
    model = from_pretrained(LlamaForCausalLM, place)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    if both:
        llama().save_pretrained(place, **options)
    mine = {"other.packed.safetensors", "model.packed-old.safetensors", "model.packed.txt"}
    for name in mine:
        (place / name).touch()
    save_pretrained(model, place, **options)
    assert {name for name in sizes_in(place) if "packed" in name} == mine
    again = from_pretrained(LlamaForCausalLM, place)
    assert same_bits(again.state_dict(), model.state_dict())
    assert kernels_of(again) == {"PackedNormMLP"}


def test_a_save_in_packed_format_without_layouts_takes_the_place_of_a_packed_one(
    folder: Path, tmp_path: Path
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    unfuse_modules(model)
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    again = from_pretrained(LlamaForCausalLM, tmp_path / "packed", fusion_config=False)
    assert same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("both", [False, True])
def test_a_save_that_fails_or_writes_other_files_leaves_the_packed_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    place = tmp_path / "packed"
    # Shards of any variant are removed by transformers, before it writes.
    save_pretrained(model, place, save_original_format=False)
    if both:
        llama().save_pretrained(place)
    before = sizes_in(place)
    save_pretrained(model, place, variant="other")
    save_pretrained(model, place / "config.json")  # Which transformers logs, and does not raise.
    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", lambda *args, **kwargs: None)
        save_pretrained(model, place)  # As where adapters alone are saved.

    def full(weights: Any, path: Any, **options: Any) -> None:
        Path(path).write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, place)
    after = sizes_in(place)
    packed = [name for name in before if ".packed" in name]
    assert [after.get(name) for name in packed] == [before[name] for name in packed]


def test_a_process_beside_the_main_one_removes_nothing_while_that_one_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    place = tmp_path / "packed"
    save_pretrained(model, place, save_original_format=False)

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        (place / "model.safetensors").write_bytes(b"a part")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", meanwhile)
    save_pretrained(model, place, is_main_process=False)
    assert (place / "model.packed.safetensors").exists()


def test_the_config_of_a_packed_checkpoint_may_be_saved_beside_other_weights(
    folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    assert stored(tmp_path / "packed") == {"families": [["packed_norm_mlp", True]]}
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path / "packed"))
    other.save_pretrained(tmp_path / "other")
    again = from_pretrained(LlamaForCausalLM, tmp_path / "other")
    assert same_bits(again.state_dict(), other.state_dict())
    assert kernels_of(again) == {"PackedNormMLP"}


def test_packed_weights_need_no_entry_in_the_config(folder: Path, tmp_path: Path) -> None:
    model = llama()
    fuse(model, PACKED)
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    assert stored(tmp_path / "packed") is None
    assert not hasattr(model.config, "module_fusion")
    again, info = from_pretrained(LlamaForCausalLM, tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert not report(again).groups
    assert same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("shards", [1, 3])
def test_packed_weights_saved_again_in_more_or_fewer_files_are_the_ones_that_are_loaded(
    folder: Path, tmp_path: Path, shards: int
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    options: list[dict[str, Any]] = [{"max_shard_size": "40KB"}, {}]
    first, second = options if shards == 1 else reversed(options)
    save_pretrained(model, tmp_path / "packed", save_original_format=False, **first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_pretrained(model, tmp_path / "packed", save_original_format=False, **second)
    again = from_pretrained(LlamaForCausalLM, tmp_path / "packed")
    assert same_bits(again.state_dict(), model.state_dict())


def test_packed_files_that_are_not_all_there_are_an_error(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    shards, single = tmp_path / "shards", tmp_path / "single"
    save_pretrained(model, shards, save_original_format=False, max_shard_size="40KB")
    lost = sorted(shards.glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(FusionError, match=f"names {lost.name}, which is not there"):
        from_pretrained(LlamaForCausalLM, shards)
    save_pretrained(model, single, save_original_format=False)
    save_file({"a": torch.zeros(1)}, single / "model.packed.safetensors")
    with pytest.raises(FusionError, match=r"model\.packed\.safetensors do not say how"):
        from_pretrained(LlamaForCausalLM, single)


@pytest.mark.parametrize("subfolder", ["", "model"])
def test_a_packed_checkpoint_of_the_hub_is_found(
    folder: Path, tmp_path: Path, subfolder: str
) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    repository = tmp_path / "cache" / "models--mine--packed"
    save_pretrained(model, repository / "snapshots" / "123" / subfolder, save_original_format=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("123")
    again = from_pretrained(
        LlamaForCausalLM,
        "mine/packed",
        subfolder=subfolder,
        cache_dir=tmp_path / "cache",
        local_files_only=True,
    )
    assert same_bits(again.state_dict(), model.state_dict())
    assert kernels_of(again) == {"PackedNormMLP"}
    assert again.name_or_path == "mine/packed"


def test_another_variant_is_what_transformers_loads(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    llama().save_pretrained(tmp_path / "packed", variant="other")
    again = from_pretrained(LlamaForCausalLM, tmp_path / "packed", variant="other")
    assert same_bits(again.state_dict(), llama().state_dict())
    with pytest.raises(OSError, match=r"model\.fp16\.safetensors"):
        from_pretrained(LlamaForCausalLM, tmp_path / "packed", variant="fp16")


def test_the_config_of_the_checkpoint_counts_where_another_one_is_given(
    folder: Path, tmp_path: Path
) -> None:
    given = LlamaConfig.from_pretrained(folder)
    from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED).save_pretrained(tmp_path / "a")
    model = from_pretrained(LlamaForCausalLM, tmp_path / "a", config=given)
    assert kernels_of(model) == {"PackedNormMLP"}
    assert model.config.module_fusion == {"families": [["packed_norm_mlp", True]]}
    assert not hasattr(given, "module_fusion")
    given.module_fusion = {"families": [["rms_norm_mlp", True]]}
    model = from_pretrained(LlamaForCausalLM, tmp_path / "a", config=given)
    assert kernels_of(model) == {"PackedNormMLP"}
    # Where the checkpoint says nothing, the config that is given may.
    assert kernels_of(from_pretrained(LlamaForCausalLM, folder, config=given)) == {"RMSNormMLP"}


def test_a_model_without_layouts_has_one_format(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config={"rms_norm_mlp": True})
    save_pretrained(model, tmp_path / "fused", save_original_format=False)
    assert file_of(tmp_path / "fused") == file_of(folder)


def reverse(weights: Any) -> Tensor:
    return torch.cat(list(reversed(weights)))


def unreverse(packed: Tensor, shapes: Any) -> Any:
    return list(reversed(packed.split([shape[0] for shape in reversed(shapes)])))


def test_a_layout_of_its_own_needs_its_family_to_be_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reversed(PackedNormMLPFamily):
        name = "reversed"
        layouts = (
            WeightLayout(
                "gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), reverse, unreverse
            ),
        )

        def samples(self, members: Any, generator: Any) -> Any:
            return []  # The kernel reads the halves the other way round; only files matter here.

    register_family(Reversed)
    model = from_pretrained(LlamaForCausalLM, folder, fusion_config={"reversed": True})
    save_pretrained(model, tmp_path / "packed", save_original_format=False)
    mlp = model.model.layers[1].mlp
    packed = unpacked_weights(tmp_path / "packed")["model.layers.1.mlp.fused_kernel.gate_up"]
    assert torch.equal(packed, torch.cat([mlp.up_proj.weight, mlp.gate_proj.weight]))
    again = from_pretrained(LlamaForCausalLM, tmp_path / "packed")
    assert same_bits(again.state_dict(), model.state_dict())
    monkeypatch.delitem(family._FAMILIES, "reversed")
    with pytest.raises(FusionError, match="the family 'reversed', which is not registered here"):
        from_pretrained(LlamaForCausalLM, tmp_path / "packed")


def test_state_dicts_convert_both_ways() -> None:
    model = llama()
    fuse(model, PACKED)
    original, layouts = model.state_dict(), packed_layouts(model)
    assert json.loads(json.dumps(layouts)) == layouts
    packed = pack_state_dict(original, layouts)
    assert len(packed) == len(original) - 3
    back = unpack_state_dict(packed, layouts)
    assert list(back) == list(original)
    assert same_bits(back, original)
    assert all(v.untyped_storage().nbytes() == v.nbytes for k, v in back.items() if "mlp" in k)
    # What is not complete stays as it is, and what is not packed too.
    part = {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32), "other": torch.ones(1)}
    assert pack_state_dict(part, layouts) == part
    assert unpack_state_dict(part, layouts) == part
    key = "model.layers.0.mlp.fused_kernel.gate_up"
    with pytest.raises(FusionError, match=r"has shape \(3, 3\), which are not the weights"):
        unpack_state_dict({key: torch.zeros(3, 3)}, layouts)


def test_nothing_is_warned_about_where_all_is_fused(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(LlamaForCausalLM, folder, fusion_config=PACKED)
