//! Counts of pages by owner, and what must be equal between the start of a run and its end.

use alloc::string::String;

use crate::steps::{Steps, format};

/// What [`Census::difference`] says if there is none.
pub const NO_DIFFERENCE: &str = "no difference";

/// What `TEST_CENSUS` counts, and beside it the pages that the host itself says it gave to pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// Pages that the host owns.
    pub host: u64,
    /// Pages that the hypervisor owns.
    pub hyp: u64,
    /// Pages that guests own.
    pub guest: u64,
    /// Pages of the hypervisor's table pool that hold tables.
    pub tables_used: u64,
    /// Pages of that pool that are free.
    pub tables_free: u64,
    /// Bytes of the metadata pool in use.
    pub metadata: u64,
    /// Pages that the host says it has given to the hypervisor's pools.
    pub given: u64,
}

impl Census {
    /// All pages of RAM that have an owner.
    pub fn total(&self) -> u64 {
        self.host + self.hyp + self.guest
    }

    /// What is different now and must not be, or [`NO_DIFFERENCE`]. Between two moments at which no VM exists,
    /// pages may have moved from the host to the hypervisor's pools, as many as the host gave; the tables
    /// of the host's stage-2 may be more (a split that is not folded yet) within those pages.
    pub fn difference(&self, now: &Self) -> String {
        let given = now.given.wrapping_sub(self.given);
        let mut text = String::new();
        let mut compare = |name: &str, before: u64, after: u64| {
            if before != after {
                text.push_str(&format(format_args!("{name} {before} -> {after}; ")));
            }
        };
        compare("all pages", self.total(), now.total());
        compare("guest pages", self.guest, now.guest);
        compare("host pages", self.host.wrapping_sub(given), now.host);
        compare("hypervisor pages", self.hyp.wrapping_add(given), now.hyp);
        compare("metadata bytes", self.metadata, now.metadata);
        if text.is_empty() { NO_DIFFERENCE.into() } else { text }
    }
}

/// The step that ends a story: what was counted before it and what is counted now differ in nothing. Skipped where the
/// hypervisor does not count, for want of test calls.
pub fn check_unchanged(before: Option<Census>, now: Option<Census>, steps: &mut Steps) {
    const NAME: &str = "census-is-that-of-the-start";
    let (Some(before), Some(now)) = (before, now) else {
        steps.skip(NAME, "this build of the hypervisor has no test calls");
        return;
    };
    steps.tell(format_args!("  before: {before}"));
    steps.tell(format_args!("  now:    {now}"));
    let difference = before.difference(&now);
    steps.check(NAME, NO_DIFFERENCE, &difference, difference == NO_DIFFERENCE);
}

impl core::fmt::Display for Census {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "host {} hyp {} guest {} tables {}+{} metadata {} given {}",
            self.host, self.hyp, self.guest, self.tables_used, self.tables_free, self.metadata, self.given
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Census =
        Census { host: 1000, hyp: 100, guest: 0, tables_used: 5, tables_free: 20, metadata: 64, given: 2 };

    #[test]
    fn pages_given_to_pools_explain_themselves() {
        let now = Census { host: 990, hyp: 110, given: 12, tables_used: 9, tables_free: 26, ..START };
        assert_eq!(START.difference(&now), NO_DIFFERENCE);
    }

    #[test]
    fn a_page_that_is_lost_or_kept_is_named() {
        let lost = Census { host: 999, ..START };
        assert_eq!(START.difference(&lost), "all pages 1100 -> 1099; host pages 1000 -> 999; ");
        let kept = Census { host: 999, guest: 1, ..START };
        assert_eq!(START.difference(&kept), "guest pages 0 -> 1; host pages 1000 -> 999; ");
    }
}
