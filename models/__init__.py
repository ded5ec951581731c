"""The decoder, its KV cache, LoRA, and checkpoints in and out."""

from srit.models.cache import KVCache
from srit.models.config import ModelConfig
from srit.models.decoder import Decoder
from srit.models.load import load_model, save_model

__all__ = ["Decoder", "KVCache", "ModelConfig", "load_model", "save_model"]
