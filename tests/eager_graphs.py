"""CUDA graphs without a GPU, for the engine's tests with and without Triton's interpreter."""


class EagerGraphs(dict):
    """`CudaGraphs` that keeps the calls and makes them again."""

    def capture(self, key, call) -> float:
        self[key] = call
        return 0.0

    def replay(self, key) -> None:
        self[key]()
