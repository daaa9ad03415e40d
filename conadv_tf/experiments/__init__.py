"""The paper's tables and figures, studies, and the analysis of finished runs."""
