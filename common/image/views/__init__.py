"""Views: variants of an image whose grids are stored next to those of the original.

Every module of this package adds the views that it registers.
"""

from gridcap.common.image.views.registry import (
    SelectedView,
    expand_views,
    register_square_view,
    register_view,
    select_view,
)

__all__ = ["SelectedView", "expand_views", "register_square_view", "register_view", "select_view"]
