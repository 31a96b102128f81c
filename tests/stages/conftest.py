from tests.runs import codebook_run, needs, vit_run

__all__ = ["codebook_run", "needs", "vit_run"]
