"""The quickstart and two changes to it, three seeds each: is a difference larger than the luck of a seed?

jaxvl sweep --config=configs/sweeps/quickstart_seeds.py --workdir=runs/seeds
"""


def sweep() -> dict:
    return dict(
        config="../clip_quickstart.py",
        metric="val/i2t/r@1",
        also=("val/t2i/r@1",),
        rows={
            "clip": {},
            "clip, warm": {"method.temperature": 0.2},
            "siglip": {"config": "../siglip_quickstart.py"},
        },
        seeds=(0, 1, 2),
    )
