"""Which kernels a device gets, how another choice is forced, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hopper_attention import attention_fp8, backend, flash_attn_func, quantize, simulator
from hopper_attention.dispatch import manifest, plan
from hopper_attention.dispatch import target as targets
from hopper_attention.dispatch.instances import forward_instance
from hopper_attention.dispatch.target import SHARED_MEMORY, choose
from hopper_attention.launch import runtime
from hopper_attention.problem.values import Options

Q = torch.randn(1, 40, 2, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "forced", "expected"),
    [
        ((9, 0), None, ("hopper", "sm_90a", 227)),
        ((9, 0), "hopper", ("hopper", "sm_90a", 227)),
        ((9, 0), "ampere", ("ampere", "sm_90", 227)),
        ((8, 0), None, ("ampere", "sm_80", 163)),
        ((8, 0), "ampere", ("ampere", "sm_80", 163)),
        ((8, 7), None, ("ampere", "sm_80", 163)),
        ((8, 6), None, ("ampere", "sm_80", 99)),
        ((8, 9), None, ("ampere", "sm_80", 99)),
    ],
)
def test_choice(capability, forced, expected):
    target = choose(capability, forced)
    assert (target.kernels, target.architecture, target.shared_memory >> 10) == expected


@pytest.mark.parametrize(
    ("capability", "forced", "message"),
    [
        ((8, 0), "hopper", r"8\.0.*9\.0.*HOPPER_ATTENTION_BACKEND=ampere"),
        ((7, 5), None, r"7\.5.*8\.0, 8\.6, 8\.7, 8\.9, 9\.0.*HOPPER_ATTENTION_BACKEND=reference"),
        ((10, 0), "ampere", r"10\.0.*there are kernels for"),
        ((12, 0), "hopper", r"12\.0.*there are kernels for"),
    ],
)
def test_no_choice(capability, forced, message):
    with pytest.raises(NotImplementedError, match=message):
        choose(capability, forced)
    assert choose(capability, "reference").kernels == "reference"


def test_every_target_has_every_head_dim():
    """A device with kernels has them for all that is documented: every build is one for all 8.x."""
    kinds = {i.architecture for i in manifest.instances().values() if i.family == "ampere_forward"}
    for capability in SHARED_MEMORY:
        target = choose(capability, "ampere")
        assert target.architecture in kinds
        for dims in ((64, 64), (8, 256), (96, 96), (120, 128), (192, 128), (192, 192), (256, 256)):
            for dtype in ("bf16", "fp16"):
                name = forward_instance(dtype, *dims, "local", True, True, target)
                found = manifest.instances()[name]
                assert found.shared_memory_bytes <= target.shared_memory
                assert found.architecture == target.architecture
                assert found.config["dtype"] == dtype


def launched(**arguments) -> list[str]:
    kernels: list[str] = []
    with simulator.enabled(), runtime.intercepted(lambda _, kernel, *__: kernels.append(kernel)):
        flash_attn_func(Q, Q, Q, **arguments)
    return kernels


def test_the_innermost_choice_holds():
    assert launched() == ["fwd_bf16_d64_0"]
    with backend("ampere"):
        assert launched() == launched(causal=True) == ["ampere_fwd_bf16_d64_0"]
        with backend("hopper"):
            assert launched() == ["fwd_bf16_d64_0"]
        with backend("reference"):
            assert launched() == []
        assert launched() == ["ampere_fwd_bf16_d64_0"]
    assert launched() == ["fwd_bf16_d64_0"]


def test_a_choice_is_of_its_thread():
    seen = []
    with backend("ampere"):
        thread = threading.Thread(target=lambda: seen.extend(launched()))
        thread.start()
        thread.join()
    assert seen == ["fwd_bf16_d64_0"]


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_threads_of_a_simulated_block_are_simulated():
    """Else what a pool of threads launches would silently be the reference's."""

    def launched_there() -> list[str]:
        kernels: list[str] = []
        with runtime.intercepted(lambda _, kernel, *__: kernels.append(kernel)):
            flash_attn_func(Q, Q, Q)
        return kernels

    def options_of_its_own() -> int:
        with simulator.enabled(seed=5):
            return simulator.current_options().seed

    assert in_thread(launched_there) == []
    with simulator.enabled(seed=3):
        assert in_thread(launched_there) == ["fwd_bf16_d64_0"]
        assert in_thread(simulator.current_options).seed == 3
        assert in_thread(options_of_its_own) == 5
        with simulator.enabled(seed=4):
            assert in_thread(simulator.current_options).seed == 4
        assert in_thread(simulator.current_options).seed == 3
    assert not in_thread(simulator.is_enabled)


def test_tasks_beside_a_simulated_block_are_not_simulated():
    """One thread runs both: only the context tells them apart."""

    async def inside(entered: asyncio.Event, seen: asyncio.Event) -> None:
        with simulator.enabled():
            entered.set()
            await seen.wait()

    async def main() -> bool:
        entered, seen = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, seen))
        await entered.wait()
        found = simulator.is_enabled()
        seen.set()
        await task
        return found

    assert not asyncio.run(main())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_blocks_of_threads_that_a_forked_process_lacks_are_over():
    """There nobody would ever leave them."""

    def seen_in_child() -> bool:
        child = os.fork()
        if child == 0:
            os._exit(int(simulator.is_enabled()))
        return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 1

    with simulator.enabled():
        assert seen_in_child()
        assert not in_thread(seen_in_child)
    assert not seen_in_child()


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend 'volta'; choose one of hopper, ampere, ref"),
        backend("volta"),
    ):
        pass


def in_new_process(code: str, value: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HOPPER_ATTENTION_BACKEND": value}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_environment_variable():
    code = (
        "import torch; from hopper_attention import *\n"
        "from hopper_attention.dispatch import target\n"
        "print(target.target_for(torch.empty(0)).kernels)\n"
        "with backend('hopper'): print(target.target_for(torch.empty(0)).kernels)"
    )
    assert in_new_process(code, "ampere").stdout.split() == ["ampere", "hopper"]
    assert in_new_process(code, "").stdout.split() == ["hopper", "hopper"]
    wrong = in_new_process(code, "A100")
    assert wrong.returncode != 0
    assert "backend 'A100'; choose one of" in wrong.stderr


def test_builds_for_ampere_alone():
    """CPU tensors need no kernels of Hopper's then."""
    code = (
        "import torch; from hopper_attention import flash_attn_func\n"
        "from hopper_attention.dispatch import manifest, target\n"
        "found = {n: i for n, i in manifest.instances().items() if i.architecture == 'sm_80'}\n"
        "manifest.instances = lambda: found\n"
        "q = torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16, requires_grad=True)\n"
        "flash_attn_func(q, q, q).sum().backward()\n"
        "print(target.target_for(q).kernels)"
    )
    assert in_new_process(code, "").stdout.split() == ["ampere"]


def test_graphs_decide_when_they_run():
    compiled = torch.compile(lambda q: flash_attn_func(q, q, q), backend="eager", fullgraph=True)
    kernels: list[str] = []
    with simulator.enabled(), runtime.intercepted(lambda _, name, *__: kernels.append(name)):
        compiled(Q)
        with backend("ampere"):
            compiled(Q)
        compiled(Q)
    assert kernels == ["fwd_bf16_d64_0", "ampere_fwd_bf16_d64_0", "fwd_bf16_d64_0"]


def test_gradients_under_ampere_are_its_own():
    q = Q.clone().requires_grad_()
    kernels: list[str] = []
    with simulator.enabled(), runtime.intercepted(lambda _, name, *__: kernels.append(name)):
        with backend("ampere"):
            out = flash_attn_func(q, Q, Q)
        out.sum().backward()
    expected = ("fwd_bf16_d64", "bwd_pre_bf16", "bwd_bf16_d64", "bwd_post_bf16")
    assert kernels == [f"ampere_{name}_0" for name in expected]


def test_gradients_are_of_the_backend_of_forward():
    """Also where it is not forced any more."""
    q = Q.clone().requires_grad_()
    kernels: list[str] = []
    with simulator.enabled(), runtime.intercepted(lambda _, name, *__: kernels.append(name)):
        with backend("reference"):
            out = flash_attn_func(q, Q, Q)
        out.sum().backward()
    assert kernels == []
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("watched", ["", "forward", "backward"])
def test_gradients_by_operators_are_of_the_backend_of_forward(watched, create_graph):
    """Such as a profiler makes of calls; also inside another backend."""
    q = Q.clone().requires_grad_()
    kernels: list[str] = []

    def profiled(here):
        return torch.profiler.profile() if watched == here else contextlib.nullcontext()

    with simulator.enabled(), runtime.intercepted(lambda _, name, *__: kernels.append(name)):
        with backend("ampere"), profiled("forward"):
            out = flash_attn_func(q, Q, Q)
        with backend("hopper"), profiled("backward"):
            torch.autograd.grad(out.sum(), q, create_graph=create_graph)
    expected = ("fwd_bf16_d64", "bwd_pre_bf16", "bwd_bf16_d64", "bwd_post_bf16")
    assert kernels == [f"ampere_{name}_0" for name in expected]


def test_plans_are_apart():
    shapes, dtypes = (Q.shape,) * 3, (Q.dtype,) * 3
    options = Options.of()
    targets = [
        choose((8, 0)),
        choose((9, 0)),
        choose((9, 0), "ampere"),
    ]
    instances = [plan.make_plan(shapes, dtypes, options, target).instance for target in targets]
    assert instances == ["ampere_fwd_bf16_d64", "fwd_bf16_d64", "ampere_fwd_bf16_d64_sm90"]


@pytest.mark.parametrize("call", ["attention_fp8", "flash_attn_func", "quantize"])
def test_fp8_is_hoppers(call):
    values = Q.to(torch.float8_e4m3fn)
    calls = {
        "attention_fp8": lambda: attention_fp8(Q, Q, Q),
        "flash_attn_func": lambda: flash_attn_func(values, values, values),
        "quantize": lambda: quantize.quantize(Q, "per_tensor"),
    }
    refusal = pytest.raises(NotImplementedError, match=r"FP8: only Hopper.*bfloat16.*reference")
    with backend("ampere"), simulator.enabled(), refusal:
        calls[call]()


@pytest.mark.parametrize("name", ["hopper", "ampere"])
def test_margin_leaves_a_multiprocessor(monkeypatch, name):
    """An L4 has 58, a slice of an H100 16: without one no grid could be launched."""
    monkeypatch.setattr(targets, "SIMULATED_SMS", 58)
    out = torch.ones_like(Q)
    with backend(name):
        for sm_margin in (58, 100):
            with pytest.raises(ValueError, match=rf"sm_margin must be below 58.*{sm_margin}$"):
                flash_attn_func(Q, Q, Q, sm_margin=sm_margin, out=out)
        assert len(launched(sm_margin=57)) == 1
    assert (out == 1).all()


def test_block_limit():
    """Blocks that run together on the multiprocessors that are left."""
    counts = {}
    for capability in ((8, 0), (8, 6)):
        with backend("ampere"), pytest.MonkeyPatch.context() as patch:
            patch.setitem(targets.SIMULATED, "ampere", capability)
            for name in ("ampere_fwd_bf16_d64", "ampere_fwd_bf16_d128", "ampere_fwd_bf16_d192"):
                counts[capability, name] = runtime.block_limit(name, Q, 100, sm_margin=10)
                assert runtime.block_limit(name, Q, 100, sm_margin=0) == runtime.NO_LIMIT
    assert list(counts.values()) == [180, 180, 90, 180, 90, 90]
