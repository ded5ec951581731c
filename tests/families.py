"""A small config of every supported model family, by its transformers class."""

COMMON = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
              initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
               "rope_theta": 500000.0}
FAMILIES = {
    "llama2": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True,
                                   head_dim=16)),
    "llama-linear-biased": ("LlamaConfig", dict(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralConfig", dict(sliding_window=7, head_dim=20)),
    "mistral-full": ("MistralConfig", dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=5,
                                         max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=24,
                                        layer_types=["sliding_attention", "full_attention",
                                                     "sliding_attention"])),
}
