"""The sections of a recipe.

Every field documents itself once; that text is what `regrow recipes --explain` and the docs show.
"""

from regrow.settings.base import Bos, MixtureRule, Section, Stage, Template
from regrow.settings.data import Data, Generate, TextSource
from regrow.settings.output import Evaluation, Output
from regrow.settings.pruning import Analysis, Compensation, Lora, Pruning, Search
from regrow.settings.training import Distillation, Recovery, Training

__all__ = [
    "Analysis",
    "Bos",
    "Compensation",
    "Data",
    "Distillation",
    "Evaluation",
    "Generate",
    "Lora",
    "MixtureRule",
    "Output",
    "Pruning",
    "Recovery",
    "Search",
    "Section",
    "Stage",
    "Template",
    "TextSource",
    "Training",
]
