"""What one head's attention costs: measured on this device, a roofline of another, or kept pairs where neither is had.

    table = load_or_measure(spec, lengths, windows, sinks)      # the emitted kernel's milliseconds, stored once
    table.cost(4096, sink=4, window=512)                        # ms of one head's prefill, one sequence
    layer_cost(table, 4096, [(4, 512)] * 6 + [(0, 4096)] * 2)   # ms of a layer: heads, and a fixed cost per group

The emitted kernels run one group per distinct span of a layer, so a layer costs
``sum over heads of cost(head) + group_cost * (distinct spans - 1)``. A head with a linear tail or a mean token costs
its span and that part (far.py), one whose keys are selected while running its selection and a walk over what that
keeps (blocks.py). Steps of decoding are timed where heads select tokens (steps.py).
"""

from attnopt.cost.blocks import BlockTable, Selection, load_or_measure_blocks
from attnopt.cost.far import FarTable, load_or_measure_far
from attnopt.cost.joined import Joined
from attnopt.cost.roofline import Device, Roofline, device, devices
from attnopt.cost.steps import StepTable, load_or_measure_steps
from attnopt.cost.table import MARGIN, Costs, CostTable, break_even, itemsize, kept_pairs, layer_cost
from attnopt.cost.timing import device_key, device_name, interleaved, load_or_measure, measure, path_of

__all__ = [
    "MARGIN", "BlockTable", "CostTable", "Costs", "Device", "FarTable", "Joined", "Roofline", "Selection", "StepTable",
    "break_even", "device", "device_key", "device_name", "devices", "interleaved", "itemsize", "kept_pairs",
    "layer_cost", "load_or_measure", "load_or_measure_blocks", "load_or_measure_far", "load_or_measure_steps",
    "measure", "path_of",
]  # fmt: skip
