"""Text -> rows: documents, identity, tokens, packing. Imports no model."""
