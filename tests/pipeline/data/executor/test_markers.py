"""The version of pickled executors."""

from __future__ import annotations

from datatrove.pipeline.base import PipelineStep

from pipeline.data.executor.markers import PICKLE_VERSION, Reporting

# What a pickled executor of pickle version 3 names. When this changes, raise PICKLE_VERSION.
PICKLED = {
    3: """
dedup.exact.DropDuplicates dedup.exact.ExactKeys dedup.exact.FindDuplicates dedup.exact.KeysStep dedup.near.ClusterNear
dedup.near.NearKeys dedup.paragraphs.CutParagraphs dedup.paragraphs.ParagraphKeys documents.shard.ReadUnits
documents.spool.ReadSpool documents.spool.WriteSpool documents.write.WriteDocuments executor.local.LocalExecutor
executor.slurm.SlurmExecutor filters.decontaminate.Decontaminate filters.gopher.Quality filters.gopher.Repetition
filters.language.LanguageFilter filters.length.LengthFilter filters.length.SplitLong filters.unicode.RepairUnicode
tokens.tokenize.TokenizeShard
"""
}


def test_a_class_that_pickles_name_has_not_moved_without_a_new_version() -> None:
    import pipeline.data.documents.shard
    import pipeline.data.executor.slurm
    import pipeline.data.tokens.tokenize  # noqa: F401

    def below(base: type) -> set[type]:
        return {base} | {found for child in base.__subclasses__() for found in below(child)}

    found = {f"{cls.__module__}.{cls.__name__}" for base in (PipelineStep, Reporting) for cls in below(base)}
    room = "pipeline.data."
    named = {name.removeprefix(room) for name in found if name.startswith(room)}
    assert named - {"executor.markers.Reporting", "executor.ray.RayExecutor"} == set(PICKLED[PICKLE_VERSION].split())
