"""`replace_rmsnorm`: what is replaced and what is left, what stays as it was, and whole models with their gradients."""

import copy
import datetime
import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import kernels
from kernels import InvalidInput, replace_rmsnorm
from kernels.replace import TRANSFORMERS
from oracle import DEVICE

SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
NORMS = {"Llama": 5, "Qwen3": 9, "Gemma": 5}
"""Models of two layers, with their number of norms: two a layer and one at the end; Qwen3's layers also have those of q and k."""


class Block(torch.nn.Module):
    """A norm of torch's, one without weight, one over two dimensions, and what is no such norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.RMSNorm(16, eps=1e-5)
        self.linear = torch.nn.Linear(16, 16)
        self.layer_norm = torch.nn.LayerNorm(16)
        self.bare = torch.nn.RMSNorm(16, elementwise_affine=False)
        self.pair = torch.nn.RMSNorm((2, 8), eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pair(self.bare(self.layer_norm(self.linear(self.first(x)))).unflatten(-1, (2, 8))).flatten(-2)


class Subclass(torch.nn.RMSNorm):
    pass


def norm_of_transformers(name: str, eps_name: str = "variance_epsilon", **state: torch.Tensor) -> torch.nn.Module:
    """A module that looks like one of transformers' norms."""
    kind = type(name, (torch.nn.Module,), {"__module__": "transformers.models.some.modeling_some"})
    module = kind()
    module.weight = torch.nn.Parameter(torch.ones(16))
    setattr(module, eps_name, 1e-5)
    for state_name, value in state.items():
        module.register_buffer(state_name, value)
    return module


def block(seed: int = 0) -> Block:
    """With the same random parameters whenever it is called."""
    made = Block()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.to(DEVICE)


def test_modules_parameters_hooks_and_flags_stay():
    model = block()
    modules, parameters, state = list(model.modules()), list(model.parameters()), model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.first.eval()
    seen = []
    model.first.register_forward_hook(lambda module, *_: seen.append(type(module)))
    before = model.first.weight.detach().clone()

    replace_rmsnorm(model)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert [module.training for module in (model, model.first, model.pair)] == [True, False, True]
    model(torch.ones(3, 16, device=DEVICE)).square().sum().backward()
    optimizer.step()
    assert seen == [kernels.RMSNorm]
    assert not torch.equal(model.first.weight, before)


def test_there_and_back():
    """The same values within rounding, and every attribute as before."""
    model = block()
    x = torch.randn((5, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want, attributes = model(x), [dict(vars(module)) for module in model.modules()]
    replacement = replace_rmsnorm(model)
    assert replacement.replaced == dict.fromkeys(("first", "bare", "pair"), "RMSNorm")
    assert all(isinstance(norm, kernels.RMSNorm) for norm in (model.first, model.bare, model.pair))
    assert (model(x) - want).abs().max() <= 1e-5 * want.abs().max()  # some 80 fp32 roundings, among them a difference's of like numbers
    for _ in range(2):
        replacement.restore()
        assert [dict(vars(module)) for module in model.modules()] == attributes
        assert type(model.first) is torch.nn.RMSNorm
        assert torch.equal(model(x), want)


def test_what_is_left_and_why():
    patched = norm_of_transformers("LlamaRMSNorm")
    patched.forward = lambda x: x
    integers = norm_of_transformers("MistralRMSNorm")
    integers.weight = torch.nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    elsewhere = norm_of_transformers("LlamaRMSNorm")
    type(elsewhere).__module__ = "mine"
    model = torch.nn.ModuleDict(
        {
            "layer": torch.nn.LayerNorm(16),
            "sub": Subclass(16),
            "patched": patched,
            "integers": integers,
            "elsewhere": elsewhere,
            "biased": norm_of_transformers("Qwen2RMSNorm", bias=torch.zeros(16)),
            "renamed": norm_of_transformers("GemmaRMSNorm", "epsilon"),
            "unknown": norm_of_transformers("GptOssRMSNorm"),
            "ours": kernels.RMSNorm(16),
            "good": norm_of_transformers("MistralRMSNorm"),
        }
    )
    replacement = replace_rmsnorm(model)
    assert replacement.replaced == {"good": "MistralRMSNorm"}
    assert replacement.left == {
        "layer": "LayerNorm: its class is none that is known",
        "sub": "Subclass: its class is none that is known",
        "patched": "LlamaRMSNorm: its forward was replaced, as offloading hooks do",
        "integers": "MistralRMSNorm: its weight is no vector of floats",
        "elsewhere": "LlamaRMSNorm: its class is none that is known",
        "biased": "Qwen2RMSNorm: it has more state than a weight: bias",
        "renamed": "GemmaRMSNorm: it has no eps",
        "unknown": "GptOssRMSNorm: its class is none that is known",
        "ours": "RMSNorm: it is replaced already",
    }
    text = str(replacement)
    assert text.startswith("1 norms replaced, 9 left\n  replaced 1 × MistralRMSNorm\n  left 1 × LayerNorm: its class")
    assert repr(model["good"]) == "RMSNorm((16,), eps=1e-05, elementwise_affine=True, casting='llama')"


def test_no_module():
    with pytest.raises(InvalidInput, match=r"model is a dict; pass a torch\.nn\.Module"):
        replace_rmsnorm({})


def of_rank(rank: int, file: str) -> tuple[list[list[float]], list[list[float]]]:
    """This rank's gradients by itself, and those that DistributedDataParallel leaves with it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    x = torch.randn((4, 16), generator=torch.Generator().manual_seed(rank)).to(DEVICE)
    found = []
    for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
        model = block()
        replace_rmsnorm(model)
        wrapped = wrap(model)
        wrapped(x).square().sum().backward()
        found.append([parameter.grad.flatten().tolist() for parameter in model.parameters()])
    torch.distributed.destroy_process_group()
    return found[0], found[1]


def test_two_processes_get_equal_gradients(tmp_path):
    """The mean of both, bit for bit: halves and a sum of two are exact but for the sum's one rounding."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(of_rank, rank, str(tmp_path / "rendezvous")) for rank in range(2)]
        (alone, reduced), (other_alone, other_reduced) = (future.result(timeout=180) for future in futures)
    assert reduced == other_reduced
    assert alone != other_alone
    means = [((torch.tensor(one) + torch.tensor(other)) / 2).tolist() for one, other in zip(alone, other_alone, strict=True)]
    assert reduced == means


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_classes_of_transformers(family):
    """Each class that is known computes what it is known for: the same bits, for x whose squares add up exactly."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = (
        family.removesuffix("Text").replace("2Moe", "2_moe").replace("3Moe", "3_moe").replace("5Moe", "5_moe").replace("3Next", "3_next")
    )
    folder = folder.lower().replace("2vl", "2_vl").replace("3vl", "3_vl")
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {folder}")
    norm = getattr(module, f"{family}RMSNorm")(64, eps=1e-5).to(DEVICE, torch.float16)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 1, 64))
        x = torch.randint(-8, 9, (4, 64), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
        want = norm(x)
        replacement = replace_rmsnorm(norm)
        assert replacement.replaced == {"": f"{family}RMSNorm"}
        assert torch.equal(norm(x), want)


def language_model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers, random weights, the norms' too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.0 if family == "Gemma" else 1.0, 0.3)
    return model.to(DEVICE, dtype)


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64 whose norms are the formula: the classes themselves compute in fp32 whatever they are given."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: exact_norm(norm, x)
    return exact


def exact_norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    is_gemma = type(norm).__name__ == "GemmaRMSNorm"
    weight, eps = (norm.weight + 1, norm.eps) if is_gemma else (norm.weight, norm.variance_epsilon)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def logits_and_gradients(model: torch.nn.Module, run: torch.nn.Module | None = None) -> list[torch.Tensor]:
    """Of one batch, in float64, gradients scaled to a largest value of 1. `run` stands for the model, compiled say."""
    ids = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model.zero_grad()
    output = (model if run is None else run)(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = [parameter.grad.double() for parameter in model.parameters()]
    return [output.logits.detach().double(), torch.cat([(gradient / gradient.abs().max()).flatten() for gradient in gradients])]


def assert_as_exact(got: list[torch.Tensor], unpatched: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """No farther from float64 than the unpatched model: half as far again at most, as both errors are sums of many roundings."""
    for ours, theirs, want in zip(got, unpatched, exact, strict=True):
        error, usual = ((result - want).square().mean().sqrt() for result in (ours, theirs))
        assert 0 < error <= 1.5 * usual


@pytest.mark.parametrize("family", NORMS)
def test_language_models(family):
    """Logits and gradients, eager and compiled, and after the way back those from before."""
    model = language_model(family)
    unpatched, exact = logits_and_gradients(model), logits_and_gradients(in_float64(model))
    replacement = replace_rmsnorm(model)
    assert (len(replacement.replaced), replacement.left) == (NORMS[family], {})
    assert_as_exact(logits_and_gradients(model), unpatched, exact)
    compiled = torch.compile(model, backend="aot_eager")
    assert_as_exact(logits_and_gradients(model, compiled), unpatched, exact)
    replacement.restore()
    assert all(torch.equal(one, other) for one, other in zip(logits_and_gradients(model), unpatched, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("family", NORMS)
def test_language_models_in_bf16(family, compiles):
    model = language_model(family, torch.bfloat16)
    exact = logits_and_gradients(in_float64(model))
    unpatched = logits_and_gradients(model, torch.compile(model) if compiles else None)
    replace_rmsnorm(model)
    assert_as_exact(logits_and_gradients(model, torch.compile(model) if compiles else None), unpatched, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("family", NORMS)
def test_training_in_bf16(family):
    """Thirty steps on one batch: the loss falls, and the curves lie no farther apart than bf16's from fp32's, times two."""
    curves = {}
    for name, dtype in (("unpatched", torch.bfloat16), ("patched", torch.bfloat16), ("fp32", torch.float32)):
        model = language_model(family, dtype)
        if name == "patched":
            replace_rmsnorm(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.randint(0, SIZES["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().float())
        curves[name] = torch.stack(losses)
    assert curves["patched"][-1] < curves["patched"][0]
    apart = (curves["patched"] - curves["unpatched"]).abs().max()
    assert apart <= 2 * (curves["unpatched"] - curves["fp32"]).abs().max()
