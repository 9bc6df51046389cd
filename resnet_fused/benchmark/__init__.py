"""Fair measurements of a model against its peers, with parity checked in the same run."""

from .algorithms import tune
from .case import BenchmarkError, Case, Mode, Result, check_device, out_of_memory
from .environment import backends, environment
from .inputs import photographs, random_images
from .load import LoadError, import_torchvision, load_model
from .measure import tensor_float_32
from .peers import VARIANTS, parse_peers
from .plot import write_plot
from .prepare import is_untrained, prepare_model, randomise_batch_norm
from .progress import ProgressBar
from .report import (
    check_plot,
    check_writable,
    json_text,
    print_results,
    print_table,
    write_atomically,
)
from .run import Progress, run_case
from .tuned import Tuned

__all__ = [
    "VARIANTS",
    "BenchmarkError",
    "Case",
    "LoadError",
    "Mode",
    "Progress",
    "ProgressBar",
    "Result",
    "Tuned",
    "backends",
    "check_device",
    "check_plot",
    "check_writable",
    "environment",
    "import_torchvision",
    "is_untrained",
    "json_text",
    "load_model",
    "out_of_memory",
    "parse_peers",
    "photographs",
    "prepare_model",
    "print_results",
    "print_table",
    "random_images",
    "randomise_batch_norm",
    "run_case",
    "tensor_float_32",
    "tune",
    "write_atomically",
    "write_plot",
]
