"""Draw the pictures of the site anew: after `make site`, `python docs/site_pictures.py` writes docs/site*.png.

Debian's chromium photographs the pages as they stand in `site/`, without a server and without network; it needs the
extra `browser`. What is on the pictures comes from the weights and the lessons, so draw them again when these change.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
SITE = HERE.parent / "site"
CHAPTER = "chapters/04_induction.html"
MAIN_FIGURE = "figure:has(figcaption:text('Mean attention, on random tokens that repeat'))"
EXERCISE = "section:has(> h3:has-text('previous_token_scores'))"
SCROLL = "(place, above) => scrollBy({ top: place.getBoundingClientRect().top - above, behavior: 'instant' })"
# file name: page, light or dark, width and height of the window, what to scroll to, how far below the window's top
PICTURES = {
    "site.png": ("index.html", "light", 1280, 900, "body", 0),
    "site-dark.png": ("index.html", "dark", 1280, 900, "body", 0),
    "site-phone.png": ("index.html", "light", 390, 844, "body", 0),
    "site-chapter.png": (CHAPTER, "dark", 1280, 900, MAIN_FIGURE, 250),
    "site-exercise.png": (CHAPTER, "light", 390, 844, EXERCISE, 60),
}


def main() -> None:
    """Take all pictures."""
    chromium = shutil.which("chromium")
    if chromium is None or not (SITE / "index.html").is_file():
        sys.exit("It takes chromium (apt-get install chromium) and the site (make site).")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (path, scheme, width, height, place, above) in PICTURES.items():
            # With less motion, the picture that moves stands at its end.
            window = {"width": width, "height": height}
            page = browser.new_page(viewport=window, color_scheme=scheme, reduced_motion="reduce")
            page.goto((SITE / path).as_uri())
            for _ in range(2):  # figures that are drawn on the way move what is below them
                page.locator(place).first.evaluate(SCROLL, above)
                page.wait_for_timeout(3000)
            page.screenshot(path=HERE / name)
        browser.close()


if __name__ == "__main__":
    main()
