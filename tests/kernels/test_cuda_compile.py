"""Every kernel compiles for the GPUs we serve, with NVIDIA's run-time compiler and without a GPU.

The table of registers, shared memory and spills is printed at the end of a run.
"""

import pytest
import torch

from kernels.cuda import backend, source
from kernels.cuda.launcher import Constants
from kernels.ops import Heads
from tests.cudasim import nvrtc

ARCHITECTURES = ("sm_80", "sm_90")
SMOL = (576, Heads(9, 3, 64))  # SmolLM2-135M
LLAMA_1B = (2048, Heads(32, 8, 64))
LLAMA_8B = (4096, Heads(32, 8, 128))  # and Qwen3-8B
LLAMA_70B = (8192, Heads(64, 8, 128))
MODELS = ((*SMOL, 16), (*LLAMA_1B, 64), (*LLAMA_8B, 16), (*LLAMA_8B, 64), (*LLAMA_70B, 64))
REGISTERS_OF_SM = 65_536
SHARED_BYTES_OF_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10}
SHARED_BYTES_OF_BLOCK = {"sm_80": 163 << 10, "sm_90": 227 << 10}
SYSTEM_SHARED_BYTES = 1 << 10  # of every block

CASES: list[tuple[str, Constants]] = [("silu_mul", ())]
for hidden, heads, block_tokens in MODELS:
    CASES += [
        ("rmsnorm", backend.norm_constants(hidden)),
        ("norm_heads", backend.head_constants(heads)),
        ("rope_kv_write", (*backend.head_constants(heads), ("BLOCK_TOKENS", block_tokens))),
        ("kv_gather", backend.gather_constants(heads, block_tokens)),
        ("paged_decode", backend.decode_constants(heads, block_tokens)),
        ("chunked_prefill", backend.prefill_constants(heads, block_tokens)),
    ]
for dtype in (torch.bfloat16, torch.float32):
    CASES.append(("sample", backend.sample_constants(dtype, backend.SAMPLE_THREADS)))
CASES.append(("sample_wide", backend.wide_constants(backend.SAMPLE_THREADS)))


def test_the_cases_name_every_kernel_file():
    assert {file for file, _ in CASES} == set(source.names())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", source.names())
def test_a_kernel_compiles_without_spilling(file, architecture, record_property):
    used: dict[str, list[nvrtc.Usage]] = {}
    for constants in dict.fromkeys(constants for name, constants in CASES if name == file):
        for usage in nvrtc.compile_kernels(file, constants, architecture):
            used.setdefault(usage.name, []).append(usage)
            assert usage.spill_bytes == 0, (usage, constants)
    kernels = {name: found for name, found in used.items() if found[0].registers is not None}
    assert kernels, f"{file}: the compiler reported nothing"
    for name, found in kernels.items():
        registers = sorted({usage.registers for usage in found})
        shared_bytes = max(usage.shared_bytes for usage in found)
        line = (
            f"{architecture} {name:15} {registers[0]:3} to {registers[-1]:3} registers, at most "
            f"{shared_bytes:3} B static shared memory, 0 B spilled in {len(found)} variants"
        )
        record_property("summary", line)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("heads", [SMOL[1], LLAMA_8B[1], LLAMA_70B[1]])
def test_as_many_decoding_blocks_fit_a_multiprocessor_as_the_grid_counts_on(heads, architecture):
    constants = backend.decode_constants(heads, 64)
    decode = {u.name: u for u in nvrtc.compile_kernels("paged_decode", constants, architecture)}
    usage = decode["paged_decode"]
    shared_bytes = backend.decode_shared_bytes(heads) + usage.shared_bytes
    assert shared_bytes <= SHARED_BYTES_OF_BLOCK[architecture]
    by_registers = REGISTERS_OF_SM // (-(-usage.registers // 8) * 8 * 128)
    by_shared = SHARED_BYTES_OF_SM[architecture] // (shared_bytes + SYSTEM_SHARED_BYTES)
    blocks = backend.DECODE_BLOCKS_PER_SM[heads.head_dim]
    assert min(by_registers, by_shared) >= (blocks if architecture == "sm_90" else 1)


def test_what_needs_a_header_is_refused_with_the_compilers_words():
    text = 'extern "C" __global__ void k(float* out) { *out = INFINITY; }'
    with pytest.raises(nvrtc.CompileFailed, match='identifier "INFINITY" is undefined'):
        nvrtc.compile_text(text, (), "sm_90")
