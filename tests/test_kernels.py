"""The Triton kernels: their results, and what they take of each GPU.

The results need a GPU, or Triton's interpreter, which a process must choose before it imports triton: so
`test_in_the_interpreter` runs this file once more with TRITON_INTERPRET=1, in which the kernels are Python functions
on the CPU. Compiling needs neither: `python -m tests.test_kernels` prints what the compiler reports for each target.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
except ImportError:
    pytest.skip("needs triton", allow_module_level=True)
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import kernels
from model.attention import rotate
from model.decoder import RMSNorm
from tests.conftest import run_process

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB of shared memory that a program may have, by target


def results(test: Callable) -> Callable:
    """Marks what compares results: it runs in the interpreter, or else on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.mark.skipif(INTERPRETED, reason="is what starts the interpreter")
def test_in_the_interpreter() -> None:
    done = run_process("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True, scope="module")
def mended_interpreter() -> Iterator[None]:
    """Mend Triton 3.9's interpreter, which cuts float32 to bfloat16 where a GPU rounds, and multiplies bfloat16
    matrices as the integers that it stores them as."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    narrow, wide = triton.language.bfloat16, triton.language.float32

    def mended_cast(self: InterpreterBuilder, source: TensorHandle, target: object) -> TensorHandle:
        if source.dtype.scalar == wide and target.scalar == narrow:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded.reshape(source.data.shape), narrow)
        return cast(self, source, target)

    def mended_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        if a.dtype.scalar == narrow:
            a, b = cast(self, a, wide), cast(self, b, wide)
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", mended_cast)
        patch.setattr(InterpreterBuilder, "create_fp_trunc", mended_cast)
        patch.setattr(InterpreterBuilder, "create_dot", mended_dot)
        yield


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """The same roundings of float32 values whose own last bit is free: by the order of a sum, or another exp."""
    bit = torch.finfo(ours.dtype).eps if ours.dtype != FULL else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=2 * bit, atol=0)
    assert ours.dtype == FULL or (ours != theirs).float().mean() < 0.01  # it seldom decides a rounding


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == FULL else 5e-3


def paged(lengths: Sequence[int], kv_heads: int, dim: int, block: int, dtype: torch.dtype) \
        -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """A cache with sequences of such lengths in blocks at random: keys, values, table; and each sequence's k and v
    (L, K, D) by themselves. Whatever nobody should read is NaN."""
    blocks = [-(-length // block) for length in lengths]
    order = (torch.randperm(sum(blocks) + 2) + 1).split([*blocks, 2])  # two blocks more than are used, and block 0
    keys, values = (torch.full((sum(blocks) + 3, kv_heads, block, dim), torch.nan, dtype=dtype) for _ in range(2))
    table = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
    plain = []
    for row, (length, mine) in enumerate(zip(lengths, order, strict=False)):
        k, v = torch.randn(length, kv_heads, dim).to(dtype), torch.randn(length, kv_heads, dim).to(dtype)
        p = torch.arange(length)
        table[row, : len(mine)] = mine
        keys[mine[p // block], :, p % block] = k
        values[mine[p // block], :, p % block] = v
        plain.append((k, v))
    return keys.to(DEVICE), values.to(DEVICE), table.to(DEVICE), plain


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64 by definition: the last of the positions are q's (T, H, D); k and v are (L, K, D)."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / q.shape[2] ** 0.5
    ahead = torch.ones(scores.shape[1:]).triu(1 + len(k) - len(q)).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)


# each value of each axis, and each pair that a kernel could confuse: dim, group, dtype, splits, block, lengths
DECODE = [
    (64, 1, BRAIN, 1, 32, [1, 0, 33, 100]),
    (80, 3, HALF, 2, 16, [65, 64, 63, 0, 200]),
    (96, 4, FULL, 4, 64, [7, 129, 0]),
    (128, 7, BRAIN, 8, 32, [31, 32, 0, 520]),
    (256, 8, HALF, 16, 32, [1, 300, 0]),
    (64, 8, FULL, 16, 16, [0, 0, 257]),
    (80, 4, BRAIN, 4, 64, [150, 2]),
    (96, 7, HALF, 1, 32, [95, 0, 97]),
    (128, 1, FULL, 2, 32, [128, 16, 1]),
    (256, 3, FULL, 1, 64, [40, 0, 17]),
    (256, 7, BRAIN, 2, 16, [96, 33]),
    (128, 4, BRAIN, 4, 32, [2049, 1023]),
    (64, 3, HALF, 16, 64, [2048, 1]),
    (8, 2, FULL, 2, 32, [100, 0, 5]),  # a tiny model's
]


@results
@pytest.mark.filterwarnings("ignore:divide by zero")  # the logarithm of an empty part's sum is meant to be -inf
@pytest.mark.parametrize(("dim", "group", "dtype", "splits", "block", "lengths"), DECODE)
def test_decode_attention(dim: int, group: int, dtype: torch.dtype, splits: int, block: int,
                          lengths: list[int]) -> None:
    torch.manual_seed(0)
    keys, values, table, plain = paged(lengths, 2, dim, block, dtype)
    q = torch.randn(len(lengths), 2 * group, dim).to(dtype)
    mixed = kernels.decode_attention(q.to(DEVICE), keys, values, table,
                                     torch.tensor(lengths, dtype=torch.int32, device=DEVICE), splits).cpu()
    assert mixed.dtype == dtype
    for row, (k, v) in enumerate(plain):
        expected = mix(q[row : row + 1], k, v)[0] if len(k) else torch.zeros(2 * group, dim)
        assert torch.equal(mixed[row], expected) if not len(k) else relative(mixed[row], expected) < tolerance(dtype)


# dim, group, dtype, block, then per sequence (cached before, new)
PREFILL = [
    (64, 1, BRAIN, 32, [(0, 1), (0, 33), (40, 5)]),
    (80, 3, HALF, 16, [(7, 60), (0, 21), (128, 1)]),
    (96, 4, FULL, 64, [(0, 64), (64, 17)]),
    (128, 7, BRAIN, 32, [(0, 65), (31, 32), (0, 2)]),
    (256, 8, HALF, 32, [(33, 9), (0, 40)]),
    (256, 3, FULL, 16, [(5, 24), (0, 1)]),
    (128, 8, FULL, 64, [(1, 30), (0, 0), (0, 3)]),
    (64, 4, HALF, 32, [(0, 0), (100, 33)]),
    (128, 4, BRAIN, 32, [(1900, 149)]),
    (8, 2, FULL, 32, [(0, 50), (33, 20)]),
]


@results
@pytest.mark.parametrize(("dim", "group", "dtype", "block", "sequences"), PREFILL)
def test_prefill_attention(dim: int, group: int, dtype: torch.dtype, block: int,
                           sequences: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    keys, values, table, plain = paged([sum(both) for both in sequences], 2, dim, block, dtype)
    new = [n for _, n in sequences]
    q = torch.randn(sum(new) + 3, 2 * group, dim).to(dtype)  # three tokens of padding
    starts = torch.tensor([0, *new]).cumsum(0).to(DEVICE, torch.int32)
    offsets = torch.tensor([before for before, _ in sequences], dtype=torch.int32, device=DEVICE)
    mixed = kernels.prefill_attention(q.to(DEVICE), keys, values, table, starts, offsets, max(new)).cpu()
    assert mixed.dtype == dtype and not mixed[sum(new) :].any()
    for ours, mine, (k, v) in zip(mixed.split([*new, 3]), q.split([*new, 3]), plain, strict=False):
        assert not len(mine) or relative(ours, mix(mine, k, v)) < tolerance(dtype)


@results
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL])
@pytest.mark.parametrize("shape", [(5, 576), (3, 7, 80), (9, 128), (2, 5000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    norm = RMSNorm(shape[-1], 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    weight = norm.weight.detach().to(DEVICE)
    assert_same(kernels.rms_norm(x.to(DEVICE), weight, 1e-5).cpu(), norm(x))
    out, summed = kernels.rms_norm(x.to(DEVICE), weight, 1e-5, residual.to(DEVICE))
    assert torch.equal(summed.cpu(), x + residual)
    assert_same(out.cpu(), norm(x + residual))


@results
@pytest.mark.parametrize(("dim", "group", "dtype", "block"), [(64, 1, BRAIN, 32), (80, 3, HALF, 16), (96, 8, FULL, 64),
                                                              (128, 7, BRAIN, 32), (256, 4, FULL, 32)])
def test_rotate_and_store(dim: int, group: int, dtype: torch.dtype, block: int) -> None:
    """To the bit: the rounding of each step is PyTorch's."""
    torch.manual_seed(0)
    tokens, kv_heads = 9, 2
    wide = torch.randn(tokens, (group + 2) * kv_heads, dim).to(dtype)
    q, k, v = wide.split((group * kv_heads, kv_heads, kv_heads), dim=1)
    angles = 100 * torch.rand(tokens, 1, dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = torch.full((2, 4, kv_heads, block, dim), torch.nan, dtype=dtype, device=DEVICE)
    slots = torch.randperm(4 * block)[:tokens]
    on_device = (x.to(DEVICE) for x in (q, k, v, cos, sin))
    rotated = kernels.rotate_and_store(*on_device, keys, values, slots.to(DEVICE))
    assert torch.equal(rotated.cpu(), rotate(q, cos, sin))
    assert torch.equal(keys.cpu()[slots // block, :, slots % block], rotate(k, cos, sin))
    assert torch.equal(values.cpu()[slots // block, :, slots % block], v)
    written = [(~x.isnan()).sum() for x in (keys, values)]
    assert written == [tokens * kv_heads * dim] * 2  # and nothing besides


@results
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL])
def test_silu_mul(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (8 * torch.randn(3, 3000)).to(dtype).split(1500, dim=1)
    both = torch.cat((gate, up), dim=1).to(DEVICE)
    assert_same(kernels.silu_mul(*both.split(1500, dim=1)).cpu(), F.silu(gate) * up)


def test_num_splits() -> None:
    assert kernels.num_splits(64, 8, 2048, 132) == 1  # 512 programs: enough
    assert kernels.num_splits(1, 8, 32768, 132) == 16
    assert kernels.num_splits(1, 2, 300, 132) == 1  # too short to be cut
    assert kernels.num_splits(8, 8, 1024, 132) == 4
    for rows in (1, 3, 64):
        for longest in (1, 512, 4096, 10**6):
            splits = kernels.num_splits(rows, 4, longest, 108)
            assert splits in (1, 2, 4, 8, 16) and (splits == 1 or longest // splits >= kernels.SHORTEST_SPLIT)


# the arguments' types; all others are pointers to the model's dtype, or constants
TYPES = {"table": "*i32", "lengths": "*i32", "starts": "*i32", "offsets": "*i32", "slots": "*i64", "sums": "*fp32",
         "parts": "*fp32", "width": "i32", "count": "i32", "scale": "fp32", "eps": "fp32"}
TYPES |= {f"{name}_stride": "i32" for name in ("q", "k", "v", "gate", "up")}


def compiled(kernel: triton.JITFunction, target: int, dtype: torch.dtype, **settings: object) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack (spilled registers lie there), bytes of shared memory."""
    name = {BRAIN: "bf16", HALF: "fp16", FULL: "fp32"}[dtype]
    options = {key: settings.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in settings}
    options.setdefault("enable_fp_fusion", kernel is not kernels.rotate_kernel)
    signature = {argument: "constexpr" if argument in settings else TYPES.get(argument, f"*{name}")
                 for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values())
               if kind.startswith("*") or kind == "i32"}
    source = ASTSource(kernel, signature, settings, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True,
                                check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", report)[-1]
    return int(registers), int(stack), binary.metadata.shared


def usage(target: int) -> Iterator[tuple[str, torch.dtype, int, int, int, int]]:
    """(kernel, dtype, D, registers, stack, shared memory) of every kernel, compiled for `target`."""
    for dtype in (BRAIN, FULL, HALF):
        for dim in (64, 128, 256) if dtype != HALF else (128,):
            padded = triton.next_power_of_2(dim)
            shape = {"KV_HEADS": 8, "GROUP": 4, "DIM": dim, "BLOCK": 32}
            tiles = {kernels.decode_kernel: shape | kernels.decode_tile(dim, 4, dtype),
                     kernels.prefill_kernel: shape | kernels.prefill_tile(dim, dtype),
                     kernels.combine_kernel: {"DIM": dim, "PADDED": padded, "SPLITS": 16, "num_warps": 1},
                     kernels.rotate_kernel: shape | {"ROWS": 4, "PADDED": padded // 2, "num_warps": 1}}
            for kernel, settings in tiles.items():
                yield kernel.__name__, dtype, dim, *compiled(kernel, target, dtype, **settings)
        for size in (128, 4096):
            settings = {"SIZE": size, "PADDED": size, "ROWS": max(1, 2048 // size), "num_warps": 4}
            yield "rms_norm_kernel", dtype, size, *compiled(kernels.rms_norm_kernel, target, dtype, **settings)
        yield "silu_mul_kernel", dtype, 8192, *compiled(kernels.silu_mul_kernel, target, dtype, SIZE=8192, TILE=1024)


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_fit_the_gpu(target: int) -> None:
    for kernel, dtype, dim, _, stack, shared in usage(target):
        assert not stack, f"{kernel} spills registers: {dtype}, {dim}, sm_{target}"
        assert shared <= SHARED_LIMIT[target] * 1024, f"{kernel} needs {shared} bytes: {dtype}, {dim}, sm_{target}"


if __name__ == "__main__":
    print("| kernel | target | dtype | D | registers | stack | shared memory |\n|---|---|---|--:|--:|--:|--:|")
    for cc in SHARED_LIMIT:
        for kernel, dtype, *numbers in usage(cc):
            print("|", " | ".join(map(str, (kernel, f"sm_{cc}", str(dtype).removeprefix("torch."), *numbers))), "|")
