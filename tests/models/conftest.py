import pytest
import torch
from families import COMMON, FAMILIES

from srit.models import load_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(directory written by transformers, their model, ours)."""
    transformers = pytest.importorskip("transformers")
    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases and norms start at constants; make them matter
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return directory, theirs, load_model(str(directory))[0]


@pytest.fixture
def ids():
    return torch.randint(3, 131, (3, 19))
