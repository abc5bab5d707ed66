import pytest

from helpers import FORMS, tiny_model


@pytest.fixture(scope="module")
def models() -> dict:
    """A model of each form, whose gates keep exactly, replace exactly, and mix."""
    models = {name: tiny_model(**fields) for name, fields in FORMS.items()}
    for name, parameter in (pair for model in models.values() for pair in model.named_parameters()):
        if name.endswith("gate_weight"):
            parameter.data *= 3
    return models
