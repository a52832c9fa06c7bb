import pytest
import verl_cases as cases


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    return cases.save_models(tmp_path_factory.mktemp("models"))
