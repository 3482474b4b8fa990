//! Random sequences of calls by a host and two guests, good and absurd, on the simulated machine. After each
//! call: no TLB grants more than the tables do, no descriptor was changed against the rules, every page of
//! memory has one owner, a page that a guest owns is reached by no other guest, a page that the host lends by just as
//! many guest pages as the host's table counts, and a page that came to the host from a guest's private memory is wiped.

use abi::host::{HostCall, HostResult};
use abi::page::{Permissions, Pool};
use abi::{Error, VmFlags, VmHandle};
use deed_tests::tell::host_call;
use deed_tests::tell_reached;
use hyp::addr::{Gfn, Pages, Pfn};
use hyp::testing::{HYP_PAGES, HYP_START, PROTECTED, RAM_PAGES, RAM_START, World};
use spec::chooser::Dice;
use std::collections::{BTreeMap, BTreeSet};

/// Sequences of a push; `DEED_SEQUENCES` asks for another number.
const SEQUENCES: u64 = 40;
const CALLS: u64 = 120;

/// Pages that the calls are about: few, so that they meet, around a block's edge and in a block.
const PAGES: [u64; 10] = [0, 1, 2, 0x1fe, 0x1ff, 0x200, 0x400, 0x600, 0x7ff, 0x4000];
/// Guest pages.
const GFNS: [u64; 8] = [0, 1, 2, 0x1ff, 0x200, 0x400, 0x8_0000, (1 << 28) - 1];
const COUNTS: [u64; 9] = [1, 1, 1, 2, 3, 0x200, 0, 1 << 52, u64::MAX];

struct Play {
    world: World,
    dice: Dice,
    vms: Vec<VmHandle>,
    /// Next pages of RAM to give for roots and tables.
    spare: u64,
    story: Vec<String>,
    /// Pages of RAM that hold something of a guest's private memory.
    secrets: BTreeSet<u64>,
    /// How often a page was seen lent to several guest pages, taken by force, and back from private memory.
    seen: [u64; 3],
}

impl Play {
    fn new(seed: u64) -> Self {
        let (world, dice) = (World::new(), Dice::new(seed));
        let (vms, secrets, story) = Default::default();
        Self { world, dice, vms, spare: 0x1000, story, secrets, seen: [0; 3] }
    }

    fn take(&mut self, pages: u64) -> u64 {
        let first = self.spare;
        self.spare += pages;
        RAM_START + first
    }

    fn call(&mut self, call: HostCall) -> HostResult {
        let result = self.world.call(call);
        let came = match result.outcome {
            Ok(()) => format!("done, {:#x}", result.values[0]),
            Err(error) => format!("{error:?}"),
        };
        self.story.push(format!("{} -> {came}", host_call(call)));
        if result.outcome == Err(Error::NoMemory) {
            self.serve_lack(call, result);
        }
        result
    }

    /// A call whose result only the story keeps.
    fn note(&mut self, call: HostCall) {
        let _ = self.call(call);
    }

    /// Gives what a call lacked, so that the play goes on.
    fn serve_lack(&mut self, call: HostCall, result: HostResult) {
        let [pages, pool, ..] = result.values;
        let vm = match call {
            HostCall::DonateGuest { vm, .. } | HostCall::ShareGuest { vm, .. } => Some(vm),
            HostCall::UnshareGuest { vm, .. } | HostCall::ReclaimGuest { vm, .. } => Some(vm),
            _ => None,
        };
        if self.spare + 16 >= RAM_PAGES - 1 {
            return;
        }
        let pfn = self.take(16);
        let give = match (Pool::from_word(pool), vm) {
            (Some(Pool::Vm), Some(vm)) => HostCall::VmTopUp { vm, pfn, pages },
            (Some(pool @ (Pool::Tables | Pool::Metadata)), _) => HostCall::PoolTopUp { pool, pfn, pages: 16 },
            other => panic!("a lack of nothing: {other:?}"),
        };
        let _ = self.world.call(give);
    }

    fn pages(&mut self) -> (u64, u64) {
        let page = match self.dice.below(12) {
            0 => HYP_START + self.dice.below(HYP_PAGES),
            1 => self.dice.pick(&[0x9000, 0x9020, u64::MAX, 1 << 36, RAM_START + 0x800]),
            _ => RAM_START + self.dice.pick(&PAGES),
        };
        (page, self.dice.pick(&COUNTS))
    }

    fn guest_run(&mut self) -> Option<Pages<Gfn>> {
        Pages::from_raw(self.dice.pick(&GFNS), self.dice.pick(&COUNTS))
    }

    fn step(&mut self) {
        let vm = if self.vms.is_empty() { None } else { Some(self.dice.pick(&self.vms.clone())) };
        let (pfn, pages) = self.pages();
        let gfn = self.dice.pick(&GFNS);
        let hyp = &self.world.hyp;
        match (self.dice.below(25), vm) {
            (0, _) if self.vms.len() < 4 && self.spare + 2 < RAM_PAGES - 1 => {
                let flags = if self.dice.below(2) == 0 { VmFlags::default() } else { PROTECTED };
                let root = self.take(2);
                let result = self.call(HostCall::VmCreate { flags, root });
                self.vms.extend(result.outcome.ok().and_then(|()| VmHandle::from_word(result.values[0])));
            }
            (1 | 2, _) => self.note(HostCall::ShareHyp { pfn, pages }),
            (3 | 4, _) => self.note(HostCall::UnshareHyp { pfn, pages }),
            (5, _) => {
                if let Some(page) = Pfn::new(pfn) {
                    let result = hyp.pin(page);
                    self.story.push(format!("pin {page:?} -> {result:?}"));
                }
            }
            (6, _) => {
                if let Some(page) = Pfn::new(pfn) {
                    let result = hyp.unpin(page);
                    self.story.push(format!("unpin {page:?} -> {result:?}"));
                }
            }
            (7..=10, Some(vm)) => self.note(HostCall::DonateGuest { vm, pfn, gfn, pages }),
            (11 | 21..=24, Some(vm)) => {
                let permissions = Permissions { write: self.dice.below(2) == 0, execute: true };
                self.note(HostCall::ShareGuest { vm, pfn, gfn, pages, permissions });
            }
            (12, Some(vm)) => self.note(HostCall::UnshareGuest { vm, gfn, pages }),
            (13..=18, Some(vm)) => {
                let choice = self.dice.below(8);
                if let Some(run) = self.guest_run() {
                    let hyp = &self.world.hyp;
                    let (name, came) = match choice {
                        0..=2 => ("MEM_SHARE", hyp.guest_share_host(vm, run)),
                        3 | 4 => ("MEM_UNSHARE", hyp.guest_unshare_host(vm, run)),
                        5 => ("MEM_RELINQUISH", hyp.guest_relinquish(vm, run)),
                        6 => ("MMIO_GUARD_MAP", hyp.guard_map(vm, run)),
                        _ => ("MMIO_GUARD_UNMAP", hyp.guard_unmap(vm, run)),
                    };
                    self.story.push(format!("{name} by {vm:?}: {run:?} -> {came:?}"));
                }
            }
            (19, _) => {
                let result = self.call(HostCall::ForceReclaim { pfn, pages });
                self.seen[1] += u64::from(result.outcome.is_ok());
            }
            (20, Some(vm)) if self.dice.below(6) == 0 => self.tear_down(vm),
            _ => {}
        }
    }

    /// Ends a VM, page by page.
    fn tear_down(&mut self, vm: VmHandle) {
        self.call(HostCall::VmTeardownStart { vm });
        for leaf in self.world.sim().leaves_stage2(self.world.guest(vm)) {
            for page in 0..leaf.size >> 12 {
                let gfn = (leaf.ipa >> 12) + page;
                for _ in 0..3 {
                    let result = self.call(HostCall::ReclaimGuest { vm, gfn, pages: 1 });
                    let result = match result.outcome {
                        Err(Error::Permission) => self.call(HostCall::UnshareGuest { vm, gfn, pages: 1 }),
                        _ => result,
                    };
                    if result.outcome.is_ok() {
                        break;
                    }
                }
            }
        }
        loop {
            let result = self.call(HostCall::VmTeardownFinish { vm });
            assert!(matches!(result.outcome, Ok(()) | Err(Error::NoMemory)), "{result:?}");
            if result.outcome.is_ok() && result.values[1] == 0 {
                break;
            }
        }
        self.vms.retain(|other| *other != vm);
    }

    /// What must hold after every call.
    fn check(&mut self, total: u64) {
        self.world.check();
        assert_eq!(self.world.census().total(), total, "every page has one owner");
        let reach = |stage2| {
            let leaves = self.world.sim().leaves_stage2(stage2).into_iter();
            leaves.flat_map(|leaf| (0..leaf.size >> 12).map(move |page| ((leaf.pa >> 12) + page, leaf.sw)))
        };
        let host: BTreeMap<u64, u8> = self
            .world
            .sim()
            .leaves_stage2(self.world.host())
            .into_iter()
            .filter(|leaf| leaf.size == 4096)
            .map(|leaf| (leaf.pa >> 12, leaf.sw))
            .collect();
        let mut guests: BTreeMap<u64, (u8, u32)> = BTreeMap::new();
        for vm in &self.vms {
            for (page, sharing) in reach(self.world.guest(*vm)) {
                let (how, times) = guests.entry(page).or_insert((sharing & 3, 0));
                *times += 1;
                assert_eq!(*how, sharing & 3, "page {page:#x} is lent to one guest and not to another");
                assert!(*how == 2 || *times == 1, "page {page:#x} of a guest is reached by two guest pages");
                let host_reaches = self.world.host_reads(page - RAM_START);
                match sharing & 3 {
                    0 => assert!(!host_reaches, "the host reaches private page {page:#x}"),
                    1 => assert_eq!(host.get(&page).map(|sw| sw & 3), Some(2), "page {page:#x}"),
                    2 => assert!(host_reaches, "a lent page {page:#x} is gone from its owner"),
                    _ => panic!("page {page:#x} is in no state of a guest"),
                }
            }
        }
        for page in PAGES.map(|page| RAM_START + page) {
            let lent = guests.get(&page).filter(|(how, _)| *how == 2).map_or(0, |(_, times)| *times);
            let (_, loans) = self.world.holds(Pfn::new(page).expect("a page of RAM"));
            assert_eq!(loans, lent, "page {page:#x}: loans that the host's table counts, and guest pages");
            self.seen[0] += u64::from(loans > 1);
            self.check_content(page, guests.get(&page).map(|(how, _)| *how));
        }
    }

    /// A page that is a guest's alone gets something that the host must not read, and is zeros when the host has it.
    fn check_content(&mut self, page: u64, guests: Option<u8>) {
        let of_ram = page - RAM_START;
        match guests {
            Some(0) if self.secrets.insert(page) => self.world.fill(of_ram),
            Some(0) => {}
            // Its guest shows it to the host.
            Some(1) => drop(self.secrets.remove(&page)),
            _ if self.world.host_reads(of_ram) && self.secrets.remove(&page) => {
                assert!(self.world.is_wiped(of_ram), "page {page:#x} comes from a guest with what it held");
                self.seen[2] += 1;
            }
            _ => {}
        }
    }
}

#[test]
fn random_calls_break_no_invariant() {
    let (mut calls, mut seen) = (0, [0; 3]);
    let sequences =
        std::env::var("DEED_SEQUENCES").ok().and_then(|number| number.parse().ok()).unwrap_or(SEQUENCES);
    for seed in 1..=sequences {
        let mut play = Play::new(seed);
        let total = play.world.census().total();
        let story = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for call in 0..CALLS {
                play.step();
                if call % 8 == 0 {
                    play.world.load_all();
                }
                play.check(total);
            }
        }));
        if let Err(panic) = story {
            let last = play.story.len().saturating_sub(30);
            eprintln!("seed {seed}, the last of {}:\n{}", play.story.len(), play.story[last..].join("\n"));
            std::panic::resume_unwind(panic);
        }
        calls += CALLS;
        seen = [0, 1, 2].map(|at| seen[at] + play.seen[at]);
    }
    tell_reached(format_args!(
        "{sequences} sequences, {calls} calls; lent to several, taken by force, back from private memory: {seen:?}"
    ));
    assert!(
        sequences < SEQUENCES || seen.iter().all(|seen| *seen > 0),
        "something was never tried: {seen:?}"
    );
}
