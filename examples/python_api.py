"""ditlab from Python: two small runs, samples, the PSNR gap, a Jacobian, a report. Half a minute on a CPU."""

import torch

import ditlab

images = ditlab.prepare("photos", size=8, out="sets/photos")
runs = [
    ditlab.train("dit-nano/2", images, n=30, test=20, steps=30, attention=plan, out=f"runs/{name}")
    for name, plan in (("global", "g*4"), ("local", "3*4"))
]
samples = runs[0].sample(seeds=range(4), sampler="ddim", steps=10)  # samples.images: uint8 [4, 8, 8, 3]
gap = ditlab.psnr_gap(runs, images=20, points=5)  # gap.table(), gap.figures(), gap.to_json()
print(gap.table())

# Any function that removes noise can be measured.
mine = ditlab.Model(
    ditlab.Denoiser.wrap(lambda y, sigma, label: y / (1 + 3 * sigma.view(-1, 1, 1, 1) ** 2), shape=(3, 8, 8)),
    images,
    n=30,
    test=20,
    name="shrink",
)
jacobian = ditlab.jacobian([runs[0], mine], sigmas=(0.3,), top=8)
print(jacobian.table())
ditlab.report([*runs, mine], out="report.html", samples=4)

again = ditlab.open("runs/global").sample(seeds=range(4), sampler="ddim", steps=10)
assert torch.equal(torch.as_tensor(again.images), torch.as_tensor(samples.images))
