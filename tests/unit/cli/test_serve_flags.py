"""`--Class.key=value` beside the flags that kvmesh has itself."""

from kvmesh.cli.serve_flags import spelled_out


def test_flags_of_a_class_are_spelled_out_and_others_stay() -> None:
    given = ["serve", "hello:Upper", "--Upper.workers=2", "--port", "0", "--Upper.model.name=a=b", "-f", "x.yaml"]
    told = [("--set", "Upper.workers=2"), ("--set", "Upper.model.name=a=b")]

    assert spelled_out(given) == ["serve", "hello:Upper", *told[0], "--port", "0", *told[1], "-f", "x.yaml"]


def test_what_only_looks_like_one_stays() -> None:
    given = ["generate", "--Upper.workers", "text --A.b=c", "--engine-option", "a.b=c", "--log-level=info"]

    assert spelled_out(given) == given
