"""The quickstart's documents: enough of them, from enough plays, that a certificate rests on more than two texts."""

from collections import defaultdict

from pipeline.config.load import load_config
from pipeline.data.documents.spool import split_key
from pipeline.data.documents.write import split_of
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Text, plan_units


def test_scenes_of_many_plays_are_held_out_and_the_test_split_is_not_empty(repository):
    data = load_config(repository / "configs" / "quickstart.yaml").data
    plays, scenes = defaultdict(set), defaultdict(int)
    for unit in plan_units(find_files(data.sources)[0]):
        for item in read_unit(unit, max_document_bytes=10**6):
            assert isinstance(item, Text) and len(item.text) > 200, item  # no scrap of headings is a document
            split = split_of(split_key(item.text), val_fraction=data.val_fraction, test_fraction=data.test_fraction)
            plays[split].add(unit.file.name)
            scenes[split] += 1
    assert sum(scenes.values()) == 777 and len(plays["train"]) == 38
    assert scenes["val"] >= 50 and len(plays["val"]) >= 20
    assert scenes["test"] >= 20 and len(plays["test"]) >= 10
