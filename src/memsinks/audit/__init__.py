"""What does a model remember, and what did removal take away?

scores       one teacher-forced pass: log-probability, rank and moments of every token, on disk
extraction   what comes out verbatim; (n, p)-extraction; canary_exposure
membership   attacks, AUC, true positive rates, the attack that looks at no model
forgetting   loss gap, gap closed, counterfactual closure, price
own_sinks    placebo sinks, closing a document's sinks
relearning   how fast it comes back
uncertainty  bootstrap over documents, Wilson intervals, equivalence tests
subjects     which model, in which state
measure      one model over all documents: the values of each
result       all models: figures with intervals
words        verdict and table as text
pictures     as SVG
report       the HTML page
audit        the whole
"""

from .audit import Model, audit
from .measure import AuditSettings
from .result import Audit
from .subjects import Subject
from .words import outcome, verdict

__all__ = ["Audit", "AuditSettings", "Model", "Subject", "audit", "outcome", "verdict"]
