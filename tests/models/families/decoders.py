"""Small decoders of transformers' families, and what they compute."""

import torch

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def outcome(model):
    """Logits of two random rows of ids below 50, and the gradients of all parameters, by name."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(torch.randint(50, (2, 7)), use_cache=False).logits
    logits.backward(torch.randn_like(logits))
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}
