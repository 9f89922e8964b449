//! How images become pixels where an adapter was trained before: as then, unless the recipe says otherwise.

use std::path::Path;

use crate::clip::decode::PixelOptions;
use crate::delta::{self, bundled};
use crate::error::Result;
use crate::recipe::{ModelConfig, Recipe};
use crate::train::{Event, Observer};

/// Takes the options of a bundle's adapters and of the adapter that training starts from.
///
/// # Errors
/// When one of them cannot be read.
pub(super) fn adopt_beneath(recipe: &mut Recipe, observer: &mut dyn Observer) -> Result<()> {
    let mut adapters = match &recipe.model {
        ModelConfig::Pretrained(spec) => bundled(spec)?,
        ModelConfig::Scratch(_) => Vec::new(),
    };
    adapters.extend(recipe.train.init_adapter.as_deref().map(delta::locate).transpose()?);
    adapters.iter().try_for_each(|dir| adopt(recipe, dir, observer))
}

/// Takes the options that an adapter was trained with, where the recipe gives no others; a note says what differs, and what holds.
///
/// # Errors
/// When the adapter's manifest cannot be read.
pub(super) fn adopt(recipe: &mut Recipe, adapter: &Path, observer: &mut dyn Observer) -> Result<()> {
    let Some(trained) = delta::manifest(adapter)?.and_then(|m| m.pixels()) else { return Ok(()) };
    let images = &mut recipe.images;
    let own = images.options().pixels();
    let used = PixelOptions {
        background: if images.stated.background { own.background } else { trained.background },
        orient: if images.stated.orient { own.orient } else { trained.orient },
    };
    (images.background, images.orient) = (used.background, used.orient);
    if trained != own {
        let place = adapter.display();
        observer.event(Event::Note(match used == trained {
            true => format!("{place}: was trained on images with {trained}; they are read so here, since the recipe says nothing else"),
            false => format!("{place}: was trained on images with {trained}; the recipe's options hold: {used}"),
        }));
    }
    Ok(())
}
