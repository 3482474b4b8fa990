//! What must hold after a step, and at the end.

use super::{IMAGE, IMAGE_PAGES, Known, Play, SECRET};
use crate::Outcomes;
use hyp::addr::Gfn;
use hyp::ownership::query::GuestPage;
use hyp::testing::lines;
use std::collections::BTreeMap;

impl Play {
    /// What must hold after a step.
    pub(super) fn check(&mut self) {
        let violations = self.sim().violations();
        assert!(violations.is_empty(), "page-table discipline:{}", lines(&violations));
        assert!(self.sim().unordered_writes().is_empty(), "descriptors that walks need not see yet");
        assert!(!self.sim().is_anything_pending(), "TLBs may still hold what was taken away");
        let touched = self.hyp.machine().take_touched();
        let trespass = touched.iter().find(|page| self.reached.contains_key(page));
        assert_eq!(trespass, None, "EL2 uses a page that a guest reaches");
        let writes = self.hyp.machine().writes();
        if writes == self.checked {
            return;
        }
        self.checked = writes;
        let stale = self.sim().stale_entries(None);
        assert!(stale.is_empty(), "stale translations:{}", lines(&stale));
        self.reached = self.reach();
        let trespass = touched.iter().find(|page| self.reached.contains_key(page));
        assert_eq!(trespass, None, "EL2 has used a page that a guest reaches");
        self.check_secrets();
    }

    /// The pages that guests reach, and how they are shared.
    fn reach(&self) -> BTreeMap<u64, u8> {
        let mut reached = BTreeMap::new();
        for vm in &self.vms {
            let Some(stage2) = self.guest(*vm) else { continue };
            for leaf in self.sim().leaves_stage2(stage2) {
                for page in (leaf.pa >> 12)..(leaf.pa + leaf.size) >> 12 {
                    assert!(self.sim().is_ram(page << 12), "a guest reaches {page:#x}, which is no RAM");
                    assert!(!self.sim().is_table(page << 12), "a guest reaches a table");
                    assert!(!(IMAGE..IMAGE + IMAGE_PAGES).contains(&page), "a guest reaches the image");
                    let host = self.sim().walk_stage2(self.host, page << 12).is_ok();
                    match leaf.sw & 3 {
                        0 => assert!(!host, "the host reaches private page {page:#x}"),
                        1 | 2 => assert!(host, "shared page {page:#x} is not the host's to reach"),
                        _ => panic!("page {page:#x} is in no state of a guest's"),
                    }
                    let before = reached.insert(page, leaf.sw & 3);
                    assert!(
                        matches!((before, leaf.sw & 3), (None, _) | (Some(2), 2)),
                        "two guests reach page {page:#x}"
                    );
                }
            }
        }
        reached
    }

    /// A secret that was written in private is gone when the host reaches its page, unless the guest shares it.
    fn check_secrets(&mut self) {
        for page in std::mem::take(&mut self.secrets) {
            let at = page << 12;
            if self.sim().walk_stage2(self.host, at).is_err() {
                self.secrets.insert(page);
            } else if self.reached.get(&page) != Some(&1) {
                let seen = [self.sim().load64(at), self.sim().load64_uncached(at)];
                assert!(!seen.contains(&SECRET), "the host reads a guest's secret in page {page:#x}");
            }
        }
    }

    pub(super) fn end(&mut self) {
        self.check();
        assert_eq!(self.hyp.census().total(), self.total, "a page has no owner, or two");
        for page in (IMAGE..IMAGE + IMAGE_PAGES).step_by(0x1_0000) {
            assert!(self.sim().walk_stage2(self.host, page << 12).is_err(), "the host reaches the image");
        }
    }

    /// Data of an access is shown only of what the guest has enrolled as a device, or of an unguarded hole.
    pub(super) fn check_mmio(&self, vm: Known, ipa: u64, size: u8, write: bool, outcomes: &mut Outcomes) {
        let page = self.hyp.guest_page(vm.handle, Gfn::new(ipa >> 12).expect("a page"));
        outcomes.note((page == GuestPage::Device, size, write));
        assert!(ipa & 0xfff <= 0x1000 - u64::from(size), "a device access across pages");
        let unguarded = !vm.flags.protected || vm.flags.mmio_unguarded;
        assert!(
            page == GuestPage::Device || unguarded && page == GuestPage::Missing,
            "data of an access at {ipa:#x}, which is {page:?}"
        );
    }
}
