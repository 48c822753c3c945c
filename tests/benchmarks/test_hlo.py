"""Reading compiled programs: what is counted, what is not, and what lives in memory meanwhile."""

import pytest

from benchmarks.hlo import Kernel, live_bytes, read_collectives, read_entry, read_kernels

# A norm, the step that needs it, and a copy: shapes of 4 KB and scalars, as XLA prints them.
GPU = """\
HloModule jit_step, is_scheduled=true

%fused_computation (p: f32[1024]) -> f32[1024] {
  %inside = f32[1024]{0} copy(%p)
}

ENTRY %main (p: f32[1024], g: f32[1024]) -> (f32[1024], f32[]) {
  %g = f32[1024]{0} parameter(1), metadata={op_name="g"}
  %p = f32[1024]{0} parameter(0), metadata={op_name="p"}
  %one = f32[] constant(1)
  %norm = f32[]{:T(128)} fusion(%g), kind=kInput, calls=%fused_computation
  %kernel = (f32[1024]{0}, bf16[1024]{0}) custom-call(%p, %g, /*index=2*/%norm), \
custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI
  %new = f32[1024]{0} get-tuple-element(%kernel), index=0
  %copy = f32[1024]{0} copy(%new)
  ROOT %tuple = (f32[1024]{0}, f32[]) tuple(%copy, %norm)
}
"""

# On chip: S(1). One parameter comes in as two slices, another whole; one result goes out.
TPU = """\
HloModule jit_step, is_scheduled=true

ENTRY %main.2 (p: f32[8,256], g: f32[8,128]) -> (f32[8,256]) {
  %p = f32[8,256]{1,0:T(8,128)} parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} parameter(1)
  %count = s32[]{:T(128)} parameter(2)
  %copy.1 = s32[]{:T(128)S(6)} copy(%count)
  %power = f32[]{:T(128)S(6)} power(%copy.1, %copy.1)
  %slice-start = ((f32[8,256]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%p), slice={[0:8], [0:128]}
  %slice-start.1 = ((f32[8,256]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%p), slice={[0:8], [128:256]}
  %slice-done = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %slice-done.1 = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %whole = f32[8,256]{1,0:T(8,128)S(1)} custom-call(%slice-done, %slice-done.1), \
custom_call_target="ConcatBitcast"
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%g)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = (f32[8,256]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}) \
fusion(%whole, %copy-done, %power), kind=kLoop
  %kept = f32[8,256]{1,0:T(8,128)S(1)} get-tuple-element(%fusion), index=0
  %spilled = f32[8,128]{1,0:T(8,128)} get-tuple-element(%fusion), index=1
  %fusion.1 = f32[8,256]{1,0:T(8,128)S(1)} fusion(%kept, %spilled), kind=kLoop
  %copy-start.1 = (f32[8,256]{1,0:T(8,128)}, f32[8,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
copy-start(%fusion.1)
  %copy-done.1 = f32[8,256]{1,0:T(8,128)} copy-done(%copy-start.1)
  ROOT %tuple = (f32[8,256]{1,0:T(8,128)}) tuple(%copy-done.1)
}
"""

KB = 1024


def test_kernels_of_a_gpu():
    assert list(read_kernels(read_entry(GPU), tpu=False)) == [
        Kernel("fusion", 4 * KB + 4),
        Kernel("pallas", (4 + 4 + 4 + 2) * KB + 4),
        Kernel("copy", 8 * KB),
    ]


def test_a_tpu_moves_what_comes_from_its_large_memory_and_goes_there():
    kernels = list(read_kernels(read_entry(TPU), tpu=True))
    assert kernels == [
        Kernel("scalar", 4),
        Kernel("scalar", 0),
        *[Kernel("transfer", 4 * KB)] * 3,
        Kernel("fusion", 4 * KB),
        Kernel("fusion", 4 * KB),
        Kernel("transfer", 8 * KB),
    ]
    assert [kernel.launched for kernel in kernels] == [False] * 5 + [True] * 2 + [False]


def test_memory_beside_arguments_and_results():
    # The kernel's float32 until it is copied, its bfloat16, which nothing reads, and no norm.
    assert live_bytes(read_entry(GPU)) == (4 + 2) * KB
    assert live_bytes(read_entry(TPU)) == 4 * KB  # what is spilled


def test_memory_is_taken_again():
    lines = ["%a = f32[256] parameter(0)"]
    lines += [f"%{new} = f32[256] copy(%{old})" for old, new in zip("abcd", "bcde", strict=True)]
    program = "\nENTRY %main {\n" + "\n".join(lines) + "\nROOT %f = f32[256] copy(%e)\n}"
    assert live_bytes(read_entry(program)) == 2 * KB


@pytest.mark.parametrize("operation", ["conditional", "while", "call"])
def test_kernels_that_are_hidden_are_an_error(operation):
    program = f"\nENTRY %main {{\n%p = f32[] parameter(0)\nROOT %x = f32[] {operation}(%p)\n}}"
    with pytest.raises(NotImplementedError, match=operation):
        list(read_kernels(read_entry(program), tpu=False))


# As XLA prints them: two of one operation, ones that only begin, and one that a computation hides.
COLLECTIVES = """\
HloModule jit_step, is_scheduled=true

%hidden (p: f32[8,2]) -> f32[8,16] {
  %p = f32[8,2]{1,0:T(8,128)} parameter(0)
  ROOT %gathered = f32[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={1}
}

ENTRY %main (a: f32[], b: bf16[3]) -> f32[] {
  %both = (f32[]{:T(128)}, bf16[3]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=8] {'x'}
  %sum = f32[4]{0} all-reduce-start(%c), channel_id=2, to_apply=%add
  %sum.1 = f32[4]{0} all-reduce-done(%sum)
  %begun = (f32[2]{0}, f32[16]{0}) all-gather-start(%d), channel_id=3
  %sent = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%e), channel_id=4
  %cut = ((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%f), channel_id=5
  ROOT %fused = f32[8,16]{1,0} fusion(%g), kind=kCustom, calls=%hidden
}
"""


def test_what_devices_tell_each_other():
    found = [(x.kind, x.elements, x.bytes) for x in read_collectives(COLLECTIVES)]
    assert found == [
        ("all-gather", 8 * 16, 4 * 8 * 16),
        ("all-reduce", 1 + 3, 4 + 2 * 3),
        ("all-reduce", 4, 16),
        ("all-gather", 16, 64),
        ("collective-permute", 5, 20),
        ("reduce-scatter", 8, 32),
    ]
    assert read_collectives(GPU) == []
