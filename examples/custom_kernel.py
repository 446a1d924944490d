"""Write your own fused kernel, and try it on a model that is in memory: fuse, verify, take back.

Run: python examples/custom_kernel.py
The kernel is LayerNorm and MLP of GPT-2 in one. The model has random weights, so nothing is
downloaded; its text is token numbers.
"""

import torch
from kernels import use_kernel_mapping
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation

from module_fusion import VerificationReport, fuse_modules, report, unfuse_modules, verify


# A layer class as the `kernels` library knows it: no parameters, no `__init__`.
class LayerNormMLP(nn.Module):
    can_torch_compile = True  # there is no graph break in it
    has_backward = True  # it may run where gradients are needed

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp  # the model's own modules: read their weights, copy none
        # This is where your code goes; from here on it may be one launch of a Triton kernel.
        x = F.layer_norm(hidden_states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = F.linear(x, mlp.c_fc.weight.T, mlp.c_fc.bias)  # a Conv1D has its weight as (in, out)
        x = F.gelu(x, approximate="tanh")
        # No dropout: where GPT-2 drops out, in training, its own modules run.
        return F.linear(x, mlp.c_proj.weight.T, mlp.c_proj.bias)


# Called once per block, with its modules: the place to refuse what the kernel does not compute.
def prepare(norm: nn.Module, mlp: nn.Module) -> None:
    if type(mlp.act) is not NewGELUActivation:
        raise ValueError(f"its activation is {type(mlp.act).__name__}, not NewGELUActivation")


LayerNormMLP.forward.prepare = prepare


class FromThisFile:  # one from the Hub is a kernels.LayerRepository("you/your-kernel", ...) instead
    def load(self) -> type[nn.Module]:
        return LayerNormMLP


def try_it(model: nn.Module, tokens: Tensor) -> VerificationReport:
    modules = {"norm": "transformer.h.*.ln_2", "mlp": "transformer.h.*.mlp"}  # in every block
    with use_kernel_mapping({"LayerNormMLP": {"cpu": FromThisFile(), "cuda": FromThisFile()}}):
        fuse_modules(model, modules, kernel="LayerNormMLP", use_fallback=False)
    model(tokens)
    print(report(model), "\n")  # which path ran, and why not the kernel
    found = verify(model, tokens, gradients=True)  # fused against unfused, kernels against float64
    unfuse_modules(model)  # exactly as before
    return found


# That is all of it. Below is a tiny model to try it on.


def main() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None)).eval()
    tokens = torch.arange(1, 9)[None]  # (batch, tokens)
    before = model(tokens).logits

    found = try_it(model, tokens)
    print(found, "\n")
    assert found.passed, found.verdict
    assert {group.path for group in found.groups} == {"kernel"}, "the kernel did not run"
    assert torch.equal(model(tokens).logits, before)
    print("The kernel ran, passed, and was taken back.")


if __name__ == "__main__":
    main()
