import socket

import pytest
import verl_cases as cases


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    return cases.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
