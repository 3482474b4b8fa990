use crate::call::{Call, Outcome};
use crate::explore::{Game, Report};
use crate::state::{GuestEntry, HostEntry, Run, State};
use crate::step::{World, step};
use crate::worlds;
use abi::page::{MAX_BORROWERS, Permissions, Pool};

/// Where the explorer's small tests play.
const WORLD: World = World { pfn: 0x40_0100, pages: 4, gfn: 0x100, gfns: 1, pins: 2 };

type Small = State<4, 1, 1>;

/// A world of four pages and one VM, with the calls that a story of one page needs.
fn small(rules: fn(&World, &Small, Call, Option<Pool>) -> (Outcome, Small)) -> Report {
    let mut calls = Vec::new();
    for pfn in 0..4 {
        let pfns = Run::one(pfn);
        calls.extend([
            Call::ShareHyp { pfns },
            Call::UnshareHyp { pfns },
            Call::Pin { pfn },
            Call::Unpin { pfn },
            Call::ForceReclaim { pfns },
            Call::DonateGuest { vm: 0, pfn, gfn: 0, count: 1 },
        ]);
    }
    let gfns = Run::one(0);
    calls.extend([0, 2].map(|root| Call::VmCreate { protected: true, immediate: true, root }));
    calls.extend([
        Call::GuestStore { vm: 0, gfn: 0 },
        Call::Share { vm: 0, gfns },
        Call::Unshare { vm: 0, vcpu: 0, gfns },
        Call::Relinquish { vm: 0, gfns },
        Call::GuardMap { vm: 0, gfns },
        Call::VmTeardownStart { vm: 0 },
        Call::ReclaimGuest { vm: 0, gfns },
        Call::VmTeardownFinish { vm: 0 },
    ]);
    Game { world: WORLD, calls, honest: false, merged: true, rules }.explore()
}

#[test]
fn a_small_world_breaks_nothing() {
    let report = small(step);
    assert_eq!(report.broken, None);
    assert!(report.states > 100, "{}", report.states);
}

#[test]
fn merging_states_loses_no_outcome() {
    let calls = worlds::honest().calls.into_iter();
    let calls = calls.filter(|call| !matches!(call, Call::Hold { .. } | Call::HostStore { .. })).collect();
    let world = World { gfns: 2, ..WORLD };
    let mut game: Game<4, 1, 2> = Game { world, calls, honest: false, merged: true, rules: step };
    game.calls.retain(|call| !matches!(call, Call::ShareHyp { .. } | Call::GuestStore { .. }));
    let merged = game.explore();
    game.merged = false;
    let all = game.explore();
    assert!(merged.states * 4 < all.states, "{} of {}", merged.states, all.states);
    assert_eq!(merged.depth, all.depth);
    assert_eq!(merged.pairs.map(|row| row.map(|n| n > 0)), all.pairs.map(|row| row.map(|n| n > 0)));
}

/// The rules, but nothing is wiped in a reclaim.
fn without_wipe(world: &World, state: &Small, call: Call, lack: Option<Pool>) -> (Outcome, Small) {
    let (outcome, mut next) = step(world, state, call, lack);
    if let Call::ReclaimGuest { .. } = call {
        for (old, new) in state.pages.iter().zip(&mut next.pages) {
            new.content = old.content;
        }
    }
    (outcome, next)
}

/// The rules, but force leaves no poison.
fn without_poison(world: &World, state: &Small, call: Call, lack: Option<Pool>) -> (Outcome, Small) {
    let (outcome, mut next) = step(world, state, call, lack);
    if let Call::ForceReclaim { .. } = call {
        next.vms[0].entries = next.vms[0].entries.map(|entry| match entry {
            GuestEntry::Poisoned => GuestEntry::Empty,
            other => other,
        });
    }
    (outcome, next)
}

/// The rules, but a device may be enrolled over poison.
fn with_a_device_over_poison(
    world: &World,
    state: &Small,
    call: Call,
    lack: Option<Pool>,
) -> (Outcome, Small) {
    let (outcome, mut next) = step(world, state, call, lack);
    match call {
        Call::GuardMap { .. } if state.vms[0].entries == [GuestEntry::Poisoned] => {
            next.vms[0].entries = [GuestEntry::Device];
            (Outcome::Done(1), next)
        }
        _ => (outcome, next),
    }
}

/// The rules, but a pin does not keep a page from being unshared.
fn without_pin_check(world: &World, state: &Small, call: Call, lack: Option<Pool>) -> (Outcome, Small) {
    let (outcome, next) = step(world, state, call, lack);
    match (call, outcome) {
        (Call::UnshareHyp { pfns }, Outcome::Refused(abi::Error::Busy)) => {
            let mut next = *state;
            next.pages[pfns.first as usize].host = HostEntry::Owned;
            (Outcome::Done(1), next)
        }
        _ => (outcome, next),
    }
}

/// The rules, but a share that lacks table pages has happened all the same.
fn with_a_share_that_lacks(world: &World, state: &Small, call: Call, lack: Option<Pool>) -> (Outcome, Small) {
    let (outcome, next) = step(world, state, call, lack);
    match (call, outcome) {
        (Call::ShareHyp { .. }, Outcome::Lacking(_)) => (outcome, step(world, state, call, None).1),
        _ => (outcome, next),
    }
}

#[test]
fn a_lack_that_changes_something_is_found_and_told() {
    let (what, story) = small(with_a_share_that_lacks).broken.unwrap();
    assert_eq!(what, "I5: a call that lacks pages changed something");
    assert_eq!(story.len(), 1, "{story:#?}");
    assert!(story[0].starts_with("SHARE_HYP") && story[0].ends_with("NoMemory: tables"), "{story:#?}");
}

#[test]
fn a_reclaim_that_does_not_wipe_is_found_by_the_shortest_story() {
    let (what, story) = small(without_wipe).broken.unwrap();
    assert_eq!(what, "I4: a private page came to the host unwiped");
    // Even a page that nobody wrote to would be found once it holds something: the guest stores first.
    assert_eq!(story.len(), 5, "{story:#?}");
    for (line, word) in
        story.iter().zip(["VM_CREATE", "DONATE_GUEST", "guest's store", "VM_TEARDOWN_START", "RECLAIM_GUEST"])
    {
        assert!(line.starts_with(word), "{line}");
    }
}

#[test]
fn force_without_a_trace_is_found() {
    let (what, story) = small(without_poison).broken.unwrap();
    assert_eq!(what, "poison: a living guest lost a page and cannot know");
    assert_eq!(story.len(), 3, "{story:#?}");
    let (what, story) = small(with_a_device_over_poison).broken.unwrap();
    assert_eq!(what, "poison: what was taken by force is not marked any more");
    assert_eq!(story.len(), 4, "{story:#?}");
}

type Lending = State<6, 2, 2>;

/// The rules, but the end of one loan is the end of all.
fn with_the_end_of_one_loan_for_all(
    world: &World,
    state: &Lending,
    call: Call,
    lack: Option<Pool>,
) -> (Outcome, Lending) {
    let (outcome, mut next) = step(world, state, call, lack);
    if let Call::UnshareGuest { .. } = call {
        for (old, new) in state.pages.iter().zip(&mut next.pages) {
            if old.host != new.host {
                new.host = HostEntry::Owned;
            }
        }
    }
    (outcome, next)
}

#[test]
fn the_end_of_a_loan_that_forgets_another_is_found_with_one_guest_or_two() {
    let mut game = worlds::hostile();
    game.rules = with_the_end_of_one_loan_for_all;
    let permissions = Permissions::ALL;
    let root = |root| Call::VmCreate { protected: false, immediate: false, root };
    let share = |vm, gfn| Call::ShareGuest { vm, pfn: 4, gfn, count: 1, permissions };
    let unshare = Call::UnshareGuest { vm: 0, gfns: Run::one(0) };
    let one_guest = vec![root(0), share(0, 0), share(0, 1), unshare];
    let two_guests = vec![root(0), root(2), share(0, 0), share(1, 0), unshare];
    for calls in [one_guest, two_guests] {
        (game.calls, game.merged) = (calls, false);
        let (what, story) = game.explore().broken.unwrap();
        assert_eq!(what, "I2: the two sides' books disagree");
        assert_eq!(story.len(), game.calls.len(), "{story:#?}");
    }
}

#[test]
fn a_page_is_lent_as_often_as_can_be_and_not_once_more() {
    let mut state: State<2, 1, 64> = State::new();
    let world = World { pfn: 0x40_0100, pages: 2, gfn: 0x100, gfns: 64, pins: 2 };
    state.vms[0].phase = crate::state::Phase::Live;
    let share = |gfn| Call::ShareGuest { vm: 0, pfn: 1, gfn, count: 1, permissions: Permissions::ALL };
    for gfn in 0..u64::from(MAX_BORROWERS) {
        let (outcome, next) = step(&world, &state, share(gfn), None);
        assert_eq!(outcome, Outcome::Done(1));
        state = next;
    }
    assert_eq!(crate::invariants::broken_by_state(&state), None);
    let refused = (Outcome::Refused(abi::Error::Busy), state);
    assert_eq!(step(&world, &state, share(MAX_BORROWERS.into()), None), refused);
}

#[test]
fn a_pin_that_is_ignored_is_found() {
    let (what, story) = small(without_pin_check).broken.unwrap();
    assert_eq!(what, "I7: a page is pinned that is not lent to the hypervisor");
    assert_eq!(story.len(), 3, "{story:#?}");
}

#[test]
fn a_story_is_told_as_it_would_happen_after_boot() {
    // The states on the way have pages renamed; told in those names, a call would be refused.
    for rules in [without_wipe, without_pin_check] {
        let (_, story) = small(rules).broken.unwrap();
        assert!(story.iter().all(|line| !line.contains("refused")), "{story:#?}");
    }
}

#[test]
fn a_lack_decides_only_when_nothing_else_refuses() {
    let state = Small::new();
    let outcome = |call, lack| step(&WORLD, &state, call, lack).0;
    let pfns = Run::one(0);
    assert_eq!(outcome(Call::ShareHyp { pfns }, Some(Pool::Tables)), Outcome::Lacking(Pool::Tables));
    assert_eq!(outcome(Call::ShareHyp { pfns }, Some(Pool::Vm)), Outcome::Done(1));
    let refused = Outcome::Refused(abi::Error::Permission);
    assert_eq!(outcome(Call::UnshareHyp { pfns }, Some(Pool::Tables)), refused);
}
