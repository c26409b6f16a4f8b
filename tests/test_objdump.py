"""What the compiler made of the hot loops, read from the disassembly: packed arithmetic, and no call."""

import bisect
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {"avx2": "ymm", "avx512": "zmm"}
FMA = re.compile(r"vfn?m(?:add|sub)\d+(?P<packed>[ps])(?P<type>[sd])")
TAKES_EXP = re.compile(r"\b(NAME\(exp\)|ce_exp_float(32|64))\(")


class Instruction(NamedTuple):
    """`chain` is the source line it comes from, and the lines that this was inlined at, innermost first."""

    address: int
    name: str
    operands: str
    chain: tuple[str, ...]


def parse(listing):
    """Functions in the output of `objdump -d -l --inlines`: pairs of a name and a list of instructions."""
    functions, chain, ended = [], [], True
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            functions.append((start[1], []))
            chain = []
        elif found := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            functions[-1][1].append(Instruction(int(found[1], 16), found[2], found[3], tuple(chain)))
            ended = True
        elif place := re.match(r"(inlined by )?(\S+):(\d+)", line):
            if ended or not place[1]:
                chain = []
            chain.append(f"{Path(place[2]).name}:{place[3]}")
            ended = False
    return [(name, instructions) for name, instructions in functions if instructions]


def innermost_loops(instructions):
    """The instructions from the target of each backward jump to the jump, if there is none such within."""
    addresses = [i.address for i in instructions]
    spans = []
    for last, i in enumerate(instructions):
        target = re.match(r"([0-9a-f]+) <", i.operands) if i.name.startswith("j") else None
        if target and addresses[0] <= int(target[1], 16) <= i.address:
            spans.append((bisect.bisect_left(addresses, int(target[1], 16)), last))
    for span in spans:
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans):
            yield instructions[span[0] : span[1] + 1]


def packed_fma(instruction, register):
    """The type, "s" or "d", of a packed FMA on this register; None of anything else."""
    fma = FMA.match(instruction.name)
    return fma["type"] if fma and fma["packed"] == "p" and f"%{register}" in instruction.operands else None


def hot_loops(functions, register):
    """(function, loop) of the innermost loops with a packed FMA."""
    return [
        (name, loop)
        for name, instructions in functions
        for loop in innermost_loops(instructions)
        if any(packed_fma(i, register) for i in loop)
    ]


def calls(loop):
    return [i.operands for i in loop if i.name.startswith("call")]


def packed_types(functions, places):
    """{place: {(register or "", type)}} of the FMA that come from each of some source lines; "" is a scalar one."""
    found = defaultdict(set)
    for _, instructions in functions:
        for i in instructions:
            if fma := FMA.match(i.name):
                register = re.search(r"%([xyz]mm)", i.operands)[1] if fma["packed"] == "p" else ""
                for place in places.intersection(i.chain):
                    found[place].add((register, fma["type"]))
    return found


@cache
def kernels():
    """The functions of the extension module."""
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("no objdump, or another processor")
    module = pytest.importorskip("ce_fast._kernels")
    command = ["objdump", "-d", "-l", "--inlines", "--no-show-raw-insn", module.__file__]
    return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def places_that_take_exp():
    """The lines of the templates where exp is taken, as file:line."""
    found = set()
    for path in ROOT.glob("ce_fast/csrc/*_tpl.h"):
        lines = enumerate(path.read_text().splitlines(), start=1)
        found |= {f"{path.name}:{number}" for number, line in lines if TAKES_EXP.search(line)}
    return found


@pytest.mark.parametrize("isa", WIDTHS)
def test_hot_loops_are_packed_and_call_nothing(isa):
    loops = hot_loops(kernels(), WIDTHS[isa])
    assert {packed_fma(i, WIDTHS[isa]) for _, loop in loops for i in loop} >= {"s", "d"}
    assert max(sum(packed_fma(i, WIDTHS[isa]) is not None for i in loop) for _, loop in loops) > 10, "exp is longer"
    assert [(name, calls(loop)) for name, loop in loops if calls(loop)] == []


@pytest.mark.parametrize("isa", WIDTHS)
def test_exp_is_packed_wherever_it_is_taken(isa):
    found = packed_types(kernels(), places_that_take_exp())
    if not any(i.chain for _, instructions in kernels() for i in instructions):
        pytest.skip("built without line numbers")
    assert len(found) >= 3, "the templates are not those that were built"
    scalar = {(place, kind) for place, kinds in found.items() for _, kind in kinds if (WIDTHS[isa], kind) not in kinds}
    assert scalar == set()


LISTING = """
0000000000000100 <outer>:
outer():
/src/rows_tpl.h:7
     100:	xor    %eax,%eax
NAME():
/src/vecmath.h:9 (discriminator 2)
inlined by /src/rows_tpl.h:8 (outer)
     108:	vfmadd213ps %ymm1,%ymm2,%ymm3
inlined by /src/rows_tpl.h:9 (outer)
     110:	vfmadd213sd %xmm1,%xmm2,%xmm3
/src/rows_tpl.h:10
     118:	{}
     120:	jne    108 <outer+0x8>
     128:	call   900 <exp@plt>
     130:	jmp    100 <outer>
     138:	ja     200 <elsewhere>
"""


@pytest.mark.parametrize(("inside", "found"), [("call   900 <exp@plt>", ["900 <exp@plt>"]), ("inc    %rax", [])])
def test_a_call_in_a_hot_loop_is_seen_and_one_around_it_is_none(inside, found):
    ((name, loop),) = hot_loops(parse(LISTING.format(inside)), "ymm")
    assert (name, [i.address for i in loop]) == ("outer", [0x108, 0x110, 0x118, 0x120])
    assert calls(loop) == found
    assert hot_loops(parse(LISTING.format(inside)), "zmm") == []


def test_an_fma_belongs_to_every_line_that_it_was_inlined_at():
    functions = parse(LISTING.format("inc    %rax"))
    found = packed_types(functions, {"rows_tpl.h:8", "rows_tpl.h:9", "rows_tpl.h:10", "vecmath.h:9"})
    assert found == {"rows_tpl.h:8": {("ymm", "s")}, "vecmath.h:9": {("ymm", "s")}, "rows_tpl.h:9": {("", "d")}}
