"""ChatGLM2-6B to GLM-4-0414, transformers' `GlmForCausalLM` and `Glm4ForCausalLM`: nothing differs from the base."""

from utils.inference.engine.models.base import ServedModel


class ServedGlm(ServedModel):
    """Causal prompts, positions that count tokens, keys and values in the cache."""
