//! Pages that were wiped or cleaned while somebody still had them.
//!
//! What a page is wiped or cleaned for holds only if nobody writes to it afterwards: access is taken away first. That
//! shows when a translation is taken away that was made before the page was wiped.

use std::collections::BTreeMap;

use crate::pending::Range;
use crate::walk::Regime;

/// The pages that were cleaned since the host was last given them, who may write past the caches; and whether each
/// was wiped since any stage 2 was given it.
#[derive(Debug, Default)]
pub(crate) struct Maintained(BTreeMap<u64, bool>);

impl Maintained {
    /// Notes that a page was wiped, which cleans it.
    pub(crate) fn wiped(&mut self, page: u64) {
        self.0.insert(page, true);
    }

    /// Notes that a page was cleaned.
    pub(crate) fn cleaned(&mut self, page: u64) {
        self.0.entry(page).or_insert(false);
    }

    /// Notes that a stage 2 is given pages.
    pub(crate) fn given(&mut self, regime: Regime, pages: Range) {
        match regime {
            Regime::El2 => {}
            Regime::HOST => {
                while let Some(page) = self.0.range(pages.start..pages.end).next().map(|(page, _)| *page) {
                    self.0.remove(&page);
                }
            }
            Regime::Stage2 { .. } => {
                self.0.range_mut(pages.start..pages.end).for_each(|(_, wiped)| *wiped = false);
            }
        }
    }

    /// Returns the first of these pages, which a stage 2 loses, that was wiped, or cleaned for its next owner,
    /// while it still had it.
    pub(crate) fn too_early(&self, regime: Regime, pages: Range) -> Option<u64> {
        if regime == Regime::El2 {
            return None;
        }
        let mut pages = self.0.range(pages.start..pages.end);
        pages.find(|(_, wiped)| **wiped || regime == Regime::HOST).map(|(page, _)| *page)
    }
}
