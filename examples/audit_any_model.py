"""What does somebody else's model remember of my documents?  python audit_any_model.py MODEL MINE.jsonl UNSEEN.jsonl"""

import sys

import memsinks as ms

model, mine, unseen = sys.argv[1:4]
result = ms.audit(model, list(ms.read_documents(mine)), list(ms.read_documents(unseen)), out="report")
print(result)
