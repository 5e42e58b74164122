//! Which of its three kinds of interrupt a function uses: what the guest's registers say, and how the host gets there.
//!
//! Pure: facts in, one step at a time out.
//!
//! ```text
//!              ┌───────────▶ Intx ───────────┐
//!   Nothing ───┼───────────▶ Msi(n) ─────────┼───▶ Nothing ───▶ ...
//!              └───────────▶ Msix ───────────┘
//! ```
//! Invariants:
//! - The host has at most one kind enabled: every change goes through `Nothing`.
//! - A step that failed is not tried again before the registers say something else, and never leaves a kind in use that was not
//!   switched on: what could not be switched off counts as on.
//!
//! Sources: PCI Local Bus 3.0, 6.8.2 (MSI and MSI-X forbid the pin); `drivers/vfio/pci/vfio_pci_intrs.c`.

/// What the guest's registers say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Switches {
    /// MSI-X is enabled.
    pub(super) msix: bool,
    /// Number of MSI vectors that are enabled; 0: MSI is off.
    pub(super) msi: u16,
    /// The function has a pin, and the guest lets it decode or reach memory: one that is wholly off has no driver that could
    /// quieten the pin. A guest that forbids the pin (command register, bit 10) is obeyed by the host, to which that bit is
    /// forwarded: Linux's drivers do it with each interrupt, so it must not cost a set-up each time.
    pub(super) pin: bool,
}

/// A kind of interrupt in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Use {
    /// None.
    #[default]
    Nothing,
    /// The pin.
    Intx,
    /// So many vectors of MSI.
    Msi(u16),
    /// MSI-X.
    Msix,
}

impl Switches {
    /// Which kind they mean. Both MSI and MSI-X on is undefined (6.8.2); MSI-X wins.
    pub(super) fn wanted(self) -> Use {
        match self {
            Self { msix: true, .. } => Use::Msix,
            Self { msi: 1.., .. } => Use::Msi(self.msi),
            Self { pin: true, .. } => Use::Intx,
            _ => Use::Nothing,
        }
    }
}

/// One thing to ask the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Switch this off.
    Disable(Use),
    /// Switch this on; nothing is on.
    Enable(Use),
}

/// What the host has enabled.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    on: Use,
    /// What a step on the way to failed.
    refused: Option<Use>,
}

impl Kinds {
    /// What is in use.
    pub(super) fn on(&self) -> Use {
        self.on
    }

    /// What to do next on the way to `wanted`; `None`: it is reached, or was refused.
    pub(super) fn next(&mut self, wanted: Use) -> Option<Step> {
        if self.refused != Some(wanted) {
            self.refused = None;
        }
        if self.on == wanted || self.refused.is_some() {
            return None;
        }
        Some(match self.on {
            Use::Nothing => Step::Enable(wanted),
            on => Step::Disable(on),
        })
    }

    /// The step was done.
    pub(super) fn done(&mut self, step: Step) {
        self.on = match step {
            Step::Disable(_) => Use::Nothing,
            Step::Enable(kind) => kind,
        };
    }

    /// The step failed on the way to `wanted`.
    pub(super) fn failed(&mut self, wanted: Use) {
        self.refused = Some(wanted);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn switches() -> impl Strategy<Value = Switches> {
        (any::<bool>(), 0u16..4, any::<bool>()).prop_map(|(msix, msi, pin)| Switches {
            msix,
            msi,
            pin,
        })
    }

    #[test]
    fn messages_forbid_the_pin() {
        let all = Switches {
            msix: true,
            msi: 4,
            pin: true,
        };
        assert_eq!(all.wanted(), Use::Msix);
        assert_eq!(Switches { msix: false, ..all }.wanted(), Use::Msi(4));
        let pin = Switches {
            pin: true,
            ..Switches::default()
        };
        assert_eq!(pin.wanted(), Use::Intx);
        assert_eq!(Switches::default().wanted(), Use::Nothing);
    }

    #[test]
    fn what_was_refused_is_asked_again_when_something_changes() {
        let mut kinds = Kinds::default();
        assert_eq!(kinds.next(Use::Msix), Some(Step::Enable(Use::Msix)));
        kinds.failed(Use::Msix);
        assert_eq!(kinds.next(Use::Msix), None);
        assert_eq!(kinds.next(Use::Nothing), None);
        assert_eq!(kinds.next(Use::Msix), Some(Step::Enable(Use::Msix)));
        kinds.done(Step::Enable(Use::Msix));
        assert_eq!(kinds.next(Use::Intx), Some(Step::Disable(Use::Msix)));
        kinds.failed(Use::Intx);
        assert_eq!((kinds.next(Use::Intx), kinds.on()), (None, Use::Msix));
        assert_eq!(kinds.next(Use::Msi(1)), Some(Step::Disable(Use::Msix)));
    }

    proptest! {
        /// A host that refuses now and then.
        #[test]
        fn one_kind_at_most_is_on(steps in prop::collection::vec((switches(), any::<[bool; 2]>()), 0..60)) {
            let mut kinds = Kinds::default();
            let mut host = Use::Nothing;
            for (switches, refusals) in steps {
                let wanted = switches.wanted();
                let mut refusals = refusals.into_iter().chain([false; 2]);
                let mut refused = false;
                let mut asked = 0;
                while let Some(step) = kinds.next(wanted) {
                    asked += 1;
                    prop_assert!(asked <= 2);
                    if refusals.next() == Some(true) {
                        kinds.failed(wanted);
                        refused = true;
                        continue;
                    }
                    host = match step {
                        Step::Enable(kind) => {
                            prop_assert_eq!(host, Use::Nothing);
                            prop_assert_ne!(kind, Use::Nothing);
                            kind
                        }
                        Step::Disable(kind) => {
                            prop_assert_eq!(host, kind);
                            Use::Nothing
                        }
                    };
                    kinds.done(step);
                }
                prop_assert_eq!(kinds.on(), host);
                prop_assert!(host == wanted || refused || asked == 0);
            }
        }
    }
}
