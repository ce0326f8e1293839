"""Other ways to choose spans, implemented here from their papers, to compare attnopt's planner with on equal terms."""
