//! Calls and outcomes in the words of a person: whoever changes a rule reads in a failure who did what to which page,
//! and what came of it.

use crate::call::{CALLS, Call, OUTCOMES, Outcome};
use crate::state::Run;
use core::fmt::{Display, Formatter, Result};

/// A run of pages by what they are.
struct Named(&'static str, Run);

impl Display for Named {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self(what, Run { first, count }) = *self;
        match count {
            0 => write!(f, "no {what}s from {first} on"),
            1 => write!(f, "{what} {first}"),
            _ => match first.checked_add(count - 1) {
                Some(last) => write!(f, "{what}s {first} to {last}"),
                None => write!(f, "{count:#x} {what}s from {first} on"),
            },
        }
    }
}

/// A page of RAM, or some.
fn pages(run: Run) -> Named {
    Named("page", run)
}

/// A guest page, or some.
fn guest_pages(run: Run) -> Named {
    Named("guest page", run)
}

impl Display for Call {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let name = CALLS[self.kind()];
        match *self {
            Self::PoolTopUp { pool, pfns } => write!(f, "{name} of {} for {pool:?}", pages(pfns)),
            Self::VmTopUp { vm, pfns } => write!(f, "{name} of {} for VM {vm}", pages(pfns)),
            Self::ShareHyp { pfns } | Self::UnshareHyp { pfns } | Self::ForceReclaim { pfns } => {
                write!(f, "{name} of {}", pages(pfns))
            }
            Self::DonateGuest { vm, pfn, gfn, count } => {
                let (pfns, gfns) = (pages(Run { first: pfn, count }), guest_pages(Run { first: gfn, count }));
                write!(f, "{name} of {pfns} to VM {vm} as {gfns}")
            }
            Self::ShareGuest { vm, pfn, gfn, count, permissions } => {
                let (pfns, gfns) = (pages(Run { first: pfn, count }), guest_pages(Run { first: gfn, count }));
                let write = if permissions.write { "writable" } else { "read-only" };
                let execute = if permissions.execute { "" } else { ", not to be executed" };
                write!(f, "{name} of {pfns} with VM {vm} as {gfns}, {write}{execute}")
            }
            Self::VmCreate { protected, immediate, root } => {
                let kind = if protected { "a protected VM" } else { "a VM that is not protected" };
                let asks = if immediate { ", unshares at once" } else { "" };
                write!(f, "{name}: {kind}{asks}, root at page {root}")
            }
            Self::UnshareAck { vm, vcpu } => write!(f, "{name} for vCPU {vcpu} of VM {vm}"),
            Self::VmTeardownStart { vm } | Self::VmTeardownFinish { vm } => write!(f, "{name} of VM {vm}"),
            Self::Unshare { vm, vcpu, gfns } => {
                write!(f, "{name} of {} by vCPU {vcpu} of VM {vm}", guest_pages(gfns))
            }
            Self::UnshareGuest { vm, gfns } | Self::ReclaimGuest { vm, gfns } => {
                write!(f, "{name} of {} of VM {vm}", guest_pages(gfns))
            }
            Self::Share { vm, gfns }
            | Self::Relinquish { vm, gfns }
            | Self::GuardMap { vm, gfns }
            | Self::GuardUnmap { vm, gfns } => write!(f, "{name} of {} by VM {vm}", guest_pages(gfns)),
            Self::GuestStore { vm, gfn } => write!(f, "{name} to guest page {gfn} by VM {vm}"),
            Self::HostStore { pfn } => write!(f, "{name} to page {pfn}"),
            Self::QueryPage { pfn } | Self::Pin { pfn } | Self::Unpin { pfn } => {
                write!(f, "{name} of page {pfn}")
            }
            Self::Map { pfn } | Self::Unmap { pfn } | Self::Hold { pfn } | Self::Release { pfn } => {
                write!(f, "{name} page {pfn}")
            }
        }
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let name = OUTCOMES[self.kind()];
        match *self {
            Self::Done(0) => f.write_str(name),
            Self::Done(1) => write!(f, "{name}, 1 page"),
            Self::Done(pages) => write!(f, "{name}, {pages} pages"),
            Self::Created(vm) => write!(f, "VM {vm} made"),
            Self::Ended(pages) => write!(f, "{name}, {pages} pages back"),
            Self::Page(_, is_memory) => write!(f, "{name}{}", if is_memory { "" } else { ", no memory" }),
            Self::Asked(pages) => write!(f, "{name} for {pages} pages"),
            Self::Missing(gfn) => write!(f, "{name}: nothing at guest page {gfn}"),
            Self::Device(gfn) => write!(f, "{name}: a device's access at guest page {gfn}"),
            Self::Refused(_) | Self::InvalidParameter => write!(f, "refused: {name}"),
            Self::Lacking(_) | Self::NotServed | Self::Aborted => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi::Error;
    use abi::page::Permissions;
    use std::string::ToString;

    #[test]
    fn a_call_says_who_does_what_to_which_pages() {
        let permissions = Permissions { write: false, execute: true };
        let told = [
            (
                Call::DonateGuest { vm: 1, pfn: 4, gfn: 0, count: 2 },
                "DONATE_GUEST of pages 4 to 5 to VM 1 as guest pages 0 to 1",
            ),
            (
                Call::ShareGuest { vm: 0, pfn: 4, gfn: 3, count: 1, permissions },
                "SHARE_GUEST of page 4 with VM 0 as guest page 3, read-only",
            ),
            (
                Call::Unshare { vm: 0, vcpu: 1, gfns: Run::one(2) },
                "MEM_UNSHARE of guest page 2 by vCPU 1 of VM 0",
            ),
            (
                Call::ShareHyp { pfns: Run { first: 3, count: u64::MAX } },
                "SHARE_HYP of 0xffffffffffffffff pages from 3 on",
            ),
            (Call::ShareHyp { pfns: Run { first: 3, count: 0 } }, "SHARE_HYP of no pages from 3 on"),
            (Call::Hold { pfn: 3 }, "host holds page 3"),
        ];
        for (call, text) in told {
            assert_eq!(call.to_string(), text);
        }
    }

    #[test]
    fn an_outcome_says_how_much_was_done_or_why_not() {
        let told = [
            (Outcome::Done(1), "done, 1 page"),
            (Outcome::Ended(5), "VM gone, 5 pages back"),
            (Outcome::Refused(Error::Busy), "refused: Busy"),
            (Outcome::Missing(7), "MissingPage: nothing at guest page 7"),
            (Outcome::Page(abi::HostState::NoPage, false), "NoPage, no memory"),
        ];
        for (outcome, text) in told {
            assert_eq!(outcome.to_string(), text);
        }
    }
}
