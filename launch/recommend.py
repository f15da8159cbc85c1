"""Show what an exported recommender says: `python launch/recommend.py EXPORT [PLATFORM ITEM ...]`.

Without a platform, the first items of each platform's catalogue serve as a history.
"""

import sys

import dtrain
from dtrain.cli.main import run


def show() -> int:
    model = dtrain.load(sys.argv[1])
    asked = {sys.argv[2]: sys.argv[3:]} if len(sys.argv) > 3 else {p: model.items(p)[:3] for p in model.platforms}
    for platform, history in asked.items():
        print(f"{platform}, after {', '.join(model.text(platform, item) for item in history)}:")
        for item in model.recommend(platform, history, k=5):
            print(f"  {item.score:8.3f}  {item.id:>10}  {item.text}")
    return 0


if __name__ == "__main__":
    sys.exit(run(show))
