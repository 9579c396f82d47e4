"""pymtl_runtime: answers of models that pymtl has trained, with numpy alone."""

from pymtl_runtime.library import Answer, InputInfo, Model, ModelError, Session, TaskInfo, isa

__all__ = ["Answer", "InputInfo", "Model", "ModelError", "Session", "TaskInfo", "isa"]
