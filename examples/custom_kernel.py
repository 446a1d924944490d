"""Write your own fused kernel, and try it on a model that is in memory.

Run: python examples/custom_kernel.py
The kernel is LayerNorm and MLP of GPT-2 in one. The model has random weights, so nothing is
downloaded; its text is token numbers.
"""

from __future__ import annotations

import torch
from kernels import use_kernel_mapping
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from module_fusion import NotFusableError, fuse_modules, report, unfuse_modules

# Which modules the kernel takes over, in every block, and the names it has for them.
MODULES = {"norm": "transformer.h.*.ln_2", "mlp": "transformer.h.*.mlp"}


# The kernel: a layer class as the `kernels` library knows it. It has no parameters and no
# `__init__`; `forward` takes what the first member takes and returns what the last one returns.
class LayerNormMLP(nn.Module):
    can_torch_compile = True  # there is no graph break in it
    has_backward = True  # it may run where gradients are needed

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp  # the model's own modules: read their weights, copy none
        # This is where your code goes. From here to the return it may be one launch of a Triton
        # kernel, in an `autograd.Function` for the backward; torch's operations run everywhere.
        x = F.layer_norm(hidden_states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = x.view(-1, x.shape[-1])
        # A Conv1D holds its weight as (in, out).
        x = torch.addmm(mlp.c_fc.bias, x, mlp.c_fc.weight)
        x = F.gelu(x, approximate="tanh")
        x = torch.addmm(mlp.c_proj.bias, x, mlp.c_proj.weight)
        # No dropout: a member that would draw random numbers at a call runs itself at that call.
        return x.view(hidden_states.shape)


def prepare(norm: nn.Module, mlp: nn.Module) -> None:
    """Called once per block, with its members: the place to refuse what the kernel is not.

    What it returns is `self.prepared` in `forward`; this kernel needs nothing.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"the norm is a {type(norm).__name__}, not a LayerNorm")
    if not isinstance(getattr(mlp, "c_fc", None), Conv1D):
        raise ValueError("the MLP has no Conv1D c_fc")
    if type(mlp.act) is not NewGELUActivation:
        raise ValueError(f"its activation is {type(mlp.act).__name__}, not NewGELUActivation")


LayerNormMLP.forward.prepare = prepare


class FromThisFile:
    """A repository of the `kernels` library: `load` is all that it needs to have.

    A published kernel is a `kernels.LayerRepository("you/your-kernel", ...)` instead.
    """

    def load(self) -> type[nn.Module]:
        return LayerNormMLP


def build_model(activation: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=64,
        activation_function=activation,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def main() -> None:
    prompt = torch.arange(1, 9)[None]

    def logits() -> Tensor:
        with torch.no_grad():
            return model(prompt).logits

    def generate() -> list[int]:
        tokens = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return tokens[0, prompt.shape[1] :].tolist()

    model = build_model("gelu_new")
    logits_before, tokens_before = logits(), generate()

    # Try it. `use_fallback=False` says so if the kernel cannot have these modules.
    mapping = {"LayerNormMLP": {"cpu": FromThisFile(), "cuda": FromThisFile()}}
    with use_kernel_mapping(mapping):
        fuse_modules(model, MODULES, kernel="LayerNormMLP", use_fallback=False)

    # Same results, and it was the kernel that gave them.
    torch.testing.assert_close(logits(), logits_before)
    assert generate() == tokens_before
    print(report(model), "\n")
    for block in report(model).fused:
        assert block.kernel_calls > 0, "the kernel did not run"
        assert block.member_calls == 0, block.reason

    # In training GPT-2 drops out at random, so its own modules run, and the report says why.
    model.train()
    model(prompt)
    print("In training:", report(model).fused[0].reason, "\n")
    assert all(block.member_calls == 1 for block in report(model).fused)
    model.eval()

    # Take it back.
    unfuse_modules(model)
    assert torch.equal(logits(), logits_before)
    assert not report(model).groups

    # What `prepare` refuses is left alone.
    other = build_model("relu")
    try:
        with use_kernel_mapping(mapping):
            fuse_modules(other, MODULES, kernel="LayerNormMLP", use_fallback=False)
    except NotFusableError as error:
        print(error, "\n")
    else:
        raise AssertionError("the kernel took an activation that it does not compute")
    assert not report(other).groups

    print("The kernel ran, gave the same tokens, and was taken back.")


if __name__ == "__main__":
    main()
