"""From a stored profile to all that an encoder needs of it: texts, layout, identity.

Must not know stores, engines or grpc. Pure functions of profile and bundle.
"""

from dataclasses import dataclass

from qanchor.bundle.manifest import Manifest
from qanchor.data.prefix import PrefixLayout, build_layout, content_digest
from qanchor.data.profile import Profile
from qanchor.data.render import RenderedProfile, render_profile
from qanchor_server.kv_pool import PrefixRef


@dataclass(frozen=True, slots=True)
class PreparedPrefix:
    """A user's prefix before the model: rendered texts, their layout and their identity."""

    ref: PrefixRef
    rendered: RenderedProfile
    layout: PrefixLayout


def prepare(profile: Profile, version: int, manifest: Manifest) -> PreparedPrefix:
    """Render a profile and identify its content."""
    return prepare_rendered(
        render_profile(profile, manifest.profile_schema),
        user_id=profile.user_id,
        version=version,
        as_of_s=profile.as_of_s,
        manifest=manifest,
    )


def prepare_rendered(
    rendered: RenderedProfile, *, user_id: str, version: int, as_of_s: int, manifest: Manifest
) -> PreparedPrefix:
    """Lay out texts that are rendered already."""
    layout = build_layout(rendered.num_events, manifest.tokens)
    ref = PrefixRef(
        user_id=user_id,
        digest=content_digest(rendered, manifest.model_id),
        version=version,
        num_tokens=len(layout),
        as_of_s=as_of_s,
    )
    return PreparedPrefix(ref, rendered, layout)
