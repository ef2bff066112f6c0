"""LangChain's own tests of vector stores, by ours."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from bridgetower.predictor import load

pytest.importorskip("langchain_core")
from bridgetower.integrations.langchain import BridgeTowerEmbeddings
from bridgetower.integrations.langchain_store import BridgeTowerVectorStore


def vector_store_tests() -> Any:
    """Returns the class of tests from its file; the package around it wants plugins that this suite does without."""
    package = find_spec("langchain_tests")
    if package is None or package.origin is None:
        pytest.skip("needs pip install --no-deps langchain-tests", allow_module_level=True)
    place = Path(package.origin).parent / "integration_tests" / "vectorstores.py"
    found = spec_from_file_location("standard_tests", place)
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module.VectorStoreIntegrationTests


class TestStandard(vector_store_tests()):  # type: ignore[misc]
    """Those without coroutines, which nothing runs here; ours are those of the base class, which call the others."""

    @pytest.fixture
    def vectorstore(self, comparable_checkpoint: Path, tmp_path: Path) -> BridgeTowerVectorStore:
        return BridgeTowerVectorStore(
            tmp_path / "documents.lance", BridgeTowerEmbeddings(load(comparable_checkpoint, device="cpu"))
        )


for _name in [name for name in dir(TestStandard) if name.endswith("_async")]:
    setattr(TestStandard, _name, None)
