"""Measure models, live or loaded by transformers: differences, perplexity, classification, generation, lm-eval."""

from qaft.evaluate.classification import Accuracy, ClassificationItem, verbalizer_accuracy
from qaft.evaluate.difference import (
    PROMPTS,
    Difference,
    PromptLogits,
    compare_logits,
    difference_table,
    logits_of,
    prompt_ids,
    read_prompts,
)
from qaft.evaluate.float32 import float32_weights, float_logits
from qaft.evaluate.generation import ExactMatch, GenerationItem, exact_match, generate, stop_ids_of
from qaft.evaluate.harness import harness_results
from qaft.evaluate.perplexity import Perplexity, samples_perplexity, text_perplexity

__all__ = [
    "PROMPTS",
    "Accuracy",
    "ClassificationItem",
    "Difference",
    "ExactMatch",
    "GenerationItem",
    "Perplexity",
    "PromptLogits",
    "compare_logits",
    "difference_table",
    "exact_match",
    "float32_weights",
    "float_logits",
    "generate",
    "harness_results",
    "logits_of",
    "prompt_ids",
    "read_prompts",
    "samples_perplexity",
    "stop_ids_of",
    "text_perplexity",
    "verbalizer_accuracy",
]
