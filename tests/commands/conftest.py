from tests.runs import codebook_run, vit_run

__all__ = ["codebook_run", "vit_run"]
