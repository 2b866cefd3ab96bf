"""What does a model remember? One teacher-forced pass, then scores: loss and verbatim extraction by number of copies."""

from .report import Audit, AuditLine, audit
from .scores import DocumentScore, extracted, generate_continuation, score

__all__ = ["Audit", "AuditLine", "DocumentScore", "audit", "extracted", "generate_continuation", "score"]
