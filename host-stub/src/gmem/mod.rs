//! guest_memfd: memory of guests as a file (Linux `virt/kvm/guest_memfd.c` is the contract).
//!
//! Two objects, as there: the inode owns pages; the view is one VM's look at it, with the bindings of its
//! memory slots. A view pins its VM; a slot does not pin its view.
//!
//! What may be done with the file (mmap, later read and write) and what state its content is in (private
//! or not) are independent. The state is EL2's to know: [`gate`] asks it before every access to content.

pub mod fallocate;
pub mod gate;
pub mod inode;
pub mod view;

pub use inode::{GmemFlags, Inode};
pub use view::View;
