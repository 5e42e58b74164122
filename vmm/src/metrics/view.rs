//! What the owner tells, whole, each time.

use std::time::Instant;

use daxhund_pin::SpaceFacts;

use crate::memory::report::RegionReport;

/// How the VM stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VmPhase {
    /// There is none.
    #[default]
    NoVm,
    /// It is defined.
    Created,
    /// It is being started.
    Booting,
    /// Its vCPUs run.
    Running,
    /// They are held.
    Paused,
}

impl VmPhase {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::NoVm,
        Self::Created,
        Self::Booting,
        Self::Running,
        Self::Paused,
    ];

    /// As `vm.info` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoVm => "NoVm",
            Self::Created => "Created",
            Self::Booting => "Booting",
            Self::Running => "Running",
            Self::Paused => "Paused",
        }
    }
}

/// What became of removals of device-dax memory, since the process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// Somebody wanted memory and was made to wait.
    pub held: u64,
    /// The memory was given up, and whoever waited went on.
    pub let_through: u64,
    /// It was refused.
    pub refused: u64,
    /// Whoever waited thought better of it.
    pub called_off: u64,
    /// Nobody was asked: regions whose memory was found to be gone.
    pub lost: u64,
}

/// What is so.
#[derive(Debug, Clone)]
pub struct View {
    /// When.
    pub at: Instant,
    /// How the VM stands.
    pub state: VmPhase,
    /// RAM that the guest has, what a balloon took apart.
    pub memory_actual_bytes: u64,
    /// Where memory is.
    pub regions: Vec<RegionReport>,
    /// What devices have counted, each by its id.
    pub devices: Vec<(String, Vec<(&'static str, u64)>)>,
    /// vhost-user backends by the id of their device, and whether they are there.
    pub backends: Vec<(String, bool)>,
    /// What passed-through devices reach.
    pub dma: Option<SpaceFacts>,
    /// Loads of the guest from memory that is gone or poisoned.
    pub machine_checks: u64,
    /// Stores of the guest to such memory.
    pub dropped_stores: u64,
    /// Removals that are over.
    pub removals: Outcomes,
    /// Those that are under way.
    pub waiting: u64,
    /// Whether a removal guard is there.
    pub has_guard: bool,
}

impl Default for View {
    fn default() -> Self {
        Self {
            at: Instant::now(),
            state: VmPhase::default(),
            memory_actual_bytes: 0,
            regions: Vec::new(),
            devices: Vec::new(),
            backends: Vec::new(),
            dma: None,
            machine_checks: 0,
            dropped_stores: 0,
            removals: Outcomes::default(),
            waiting: 0,
            has_guard: false,
        }
    }
}
