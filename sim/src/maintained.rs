//! Pages that were wiped or cleaned, as long as somebody may have had them at that time.
//!
//! What a page is wiped or cleaned for holds only if nobody writes to it afterwards: access is taken away first. That
//! shows when a translation is taken away that was made before the page was wiped.

use std::collections::BTreeMap;

use crate::pending::Range;
use crate::ram::PAGE;
use crate::walk::Regime;

/// The host's translation, by Deed's convention.
const HOST: Regime = Regime::Stage2 { vmid: 0 };

/// What was done to a page.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    /// Since a stage 2 was last given it.
    wiped: bool,
    /// Since the host was last given it, who may have written to it past the caches.
    cleaned: bool,
}

/// The pages to which something was done.
#[derive(Debug, Default)]
pub(crate) struct Maintained(BTreeMap<u64, Done>);

impl Maintained {
    /// Notes that a page was wiped, which cleans it.
    pub(crate) fn wiped(&mut self, page: u64) {
        self.0.insert(page, Done { wiped: true, cleaned: true });
    }

    /// Notes that a page was cleaned.
    pub(crate) fn cleaned(&mut self, page: u64) {
        self.0.entry(page).or_default().cleaned = true;
    }

    /// Notes that a stage 2 is given pages.
    pub(crate) fn given(&mut self, regime: Regime, pages: Range) {
        if regime == Regime::El2 {
            return;
        }
        let notes: Vec<u64> = self.0.range(pages.start..pages.end).map(|(page, _)| *page).collect();
        for page in notes {
            match self.0.get_mut(&page) {
                Some(done) if regime != HOST && done.cleaned => done.wiped = false,
                _ => drop(self.0.remove(&page)),
            }
        }
    }

    /// Returns the first of these pages, which a stage 2 loses, to which was done too early what takes that it is lost.
    pub(crate) fn too_early(&self, regime: Regime, pages: Range) -> Option<u64> {
        if regime == Regime::El2 {
            return None;
        }
        let is_early = |done: &Done| done.wiped || done.cleaned && regime == HOST;
        self.0
            .range(pages.start..pages.end)
            .find(|(_, done)| is_early(done))
            .map(|(page, _)| page & !(PAGE - 1))
    }
}
